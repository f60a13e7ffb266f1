# SPDX-License-Identifier: Apache-2.0
"""Serve a target with the method's name alone, as somebody who installed the wheels.

`test_wheels.py` runs this file where the checkout cannot be imported.

    python method_only.py TARGET RESULT

writes what happened into the file RESULT, as JSON.
"""

import json
import sys
from pathlib import Path

import vllm_mtp
from vllm_mtp.metrics import read_vllm_counters

QUESTIONS = (
    *("Why is the sky blue?", "Name the days of the week.", "What is a noun?"),
    *("Where is Rome?", "List three colours.", "How does one boil an egg?"),
)


def main(target: str, result: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        target,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_batched_tokens=128,  # as many are computed at start, for the memory
        max_num_seqs=len(QUESTIONS),
        disable_log_stats=False,
        speculative_config={"method": "mtp_placeholder"},
    )
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    answers = llm.chat(chats, greedy, use_tqdm=False)
    counts = read_vllm_counters(llm.get_metrics())
    told = {
        "package": vllm_mtp.__file__,
        "drafter": llm.llm_engine.vllm_config.speculative_config.model,
        "texts": [answer.outputs[0].text for answer in answers],
        "drafts": counts.drafts,
        "accepted": counts.accepted_tokens,
        "path": sys.path,
    }
    Path(result).write_text(json.dumps(told), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
