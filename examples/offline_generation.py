# SPDX-License-Identifier: Apache-2.0
"""Generate text with `vllm.LLM` and the method `mtp_placeholder`.

Shows: the setting `{"method": "mtp_placeholder"}` is enough (the drafter that fits the
target is found), and how to read the acceptance length.

Run:    python examples/offline_generation.py
        python examples/offline_generation.py --model TARGET --drafter FOLDER

Expect: three answers, and an acceptance length above 1.2, with the drafter that is
        shipped for the demo target. With another drafter, give the length that you
        expect: --min-acceptance-length 1.9
"""

import argparse
import os
import sys
from typing import Any

# A small KV cache and few log lines, unless you set them yourself.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

QUESTIONS = [
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "List three uses of a paper clip.",
]


def main() -> int:
    arguments = parse_arguments()
    # Not at the top of the file: vLLM starts processes that import this file again.
    from vllm import LLM, SamplingParams

    from vllm_mtp import read_vllm_counters

    method: dict[str, Any] = {"method": "mtp_placeholder"}
    if arguments.drafter:
        method["model"] = arguments.drafter
    llm = LLM(
        arguments.model or demo_target(),
        speculative_config=method,
        max_model_len=1024,
        enforce_eager=True,  # starts faster; leave it out on a GPU
        disable_log_stats=False,  # the counters are kept only then
    )
    chats: list[Any] = [[{"role": "user", "content": text}] for text in QUESTIONS]
    answers = llm.chat(chats, SamplingParams(temperature=0, max_tokens=48))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"\nQ: {question}\nA: {answer.outputs[0].text.strip()}")

    counts = read_vllm_counters(llm.get_metrics())
    positions = " ".join(f"{rate:.3f}" for rate in counts.acceptance_per_position)
    print(
        f"\nacceptance length {counts.acceptance_length:.3f}, by position {positions}"
    )
    if counts.acceptance_length < arguments.min_acceptance_length:
        print(f"FAILED: expected {arguments.min_acceptance_length} or more")
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="the target (default: the demo target)")
    parser.add_argument("--drafter", help="its drafter (default: found by the target)")
    parser.add_argument("--min-acceptance-length", type=float, default=1.2)
    return parser.parse_args()


def demo_target() -> str:
    from vllm_mtp.data.demo_target import ensure_demo_target

    return str(ensure_demo_target())


if __name__ == "__main__":
    sys.exit(main())
