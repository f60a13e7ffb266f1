# SPDX-License-Identifier: Apache-2.0
"""A vLLM that does not use our method; run in a process of its own.

    python -m tests.serving.untouched_engine TARGET [SPECULATIVE_CONFIG]

Prints one line of JSON: tokens, logprobs, and which modules of ours were loaded.
"""

import json
import sys
from typing import Any

PROMPTS = [[(7 * i + j) % 512 for i in range(20 + j)] for j in range(3)]


def main() -> None:
    from vllm import LLM, SamplingParams

    spec = json.loads(sys.argv[2]) if len(sys.argv) > 2 else None
    llm = LLM(
        sys.argv[1],
        speculative_config=spec,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        use_tqdm_on_load=False,
    )
    answers = [
        llm.generate(
            [{"prompt_token_ids": ids} for ids in PROMPTS],
            SamplingParams(
                temperature=temperature,
                seed=5,
                max_tokens=12,
                logprobs=5,
                detokenize=False,
                ignore_eos=True,
            ),
            use_tqdm=False,
        )
        for temperature in (0.0, 1.0)
    ]
    outputs = [answer.outputs[0] for batch in answers for answer in batch]
    print(
        json.dumps(
            {
                "tokens": [list(output.token_ids) for output in outputs],
                # As text that gives back every bit.
                "logprobs": [
                    _exact(position)
                    for output in outputs
                    for position in output.logprobs
                ],
                "loaded": sorted(m for m in sys.modules if m.startswith("vllm_mtp")),
            }
        )
    )


def _exact(position: Any) -> dict[str, str]:
    return {str(token): value.logprob.hex() for token, value in position.items()}


if __name__ == "__main__":
    main()
