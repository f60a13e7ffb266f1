# SPDX-License-Identifier: Apache-2.0
"""What a step costs with the method on and nothing drafted, beside plain vLLM.

Three engines of one process decode the same prompts and take turns of a few steps: the
target alone, the same again (what two equal engines differ by), and one with the
method, whose chooser is made to choose 0: it looks at all that it would look at.

python -m tools.nothing_drafted --turns 60 --batches 1 8
"""

import os
import statistics
import time
from contextlib import ExitStack
from typing import Any

from tools.command import Parser, count
from vllm_mtp.bench.cpu_settings import fastest_dtype, fastest_environment
from vllm_mtp.markdown import table

_STEPS = 8  # of a turn
_LIMIT = 2048
_PROMPT = list(range(200, 300))
PLAIN, AGAIN, OURS = "none", "none again", "nothing drafted"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--turns", type=count, default=60)
    parser.add_argument("--batches", type=count, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", default=fastest_dtype())
    options = parser.parse_args()
    rows = []
    for batch in options.batches:
        times = _measure(batch, options.turns, options.dtype, max(options.batches))
        for name in (AGAIN, OURS):
            ratios = [a / b for a, b in zip(times[name], times[PLAIN], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            rows.append(
                [
                    str(batch),
                    name,
                    f"{statistics.median(times[name]):.2f}",
                    f"{middle:.3f} ({low:.3f} to {high:.3f})",
                ]
            )
    head = ["Requests", "Engine", "ms per step", f"Over `{PLAIN}`, median (quartiles)"]
    print(f"{options.dtype}, {options.turns} turns of {_STEPS} steps\n")
    print(table(head, rows))


def _measure(batch: int, turns: int, dtype: str, most: int) -> dict[str, list[float]]:
    """Milliseconds per step of each turn, by engine."""
    from vllm_mtp.data.demo_target import ensure_demo_target
    from vllm_mtp.engine import drafter_of, sampling, start
    from vllm_mtp.serving.draft_length import Plan

    settings: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": _LIMIT,
        "max_num_seqs": most,
        "disable_log_stats": True,
        "skip_tokenizer_init": True,
    }
    target = str(ensure_demo_target())
    endless = sampling(max_tokens=None, ignore_eos=True, detokenize=False)
    times: dict[str, list[float]] = {PLAIN: [], AGAIN: [], OURS: []}
    with ExitStack() as stack:
        engines = {}
        for name in times:
            spec = {"method": "mtp_placeholder"} if name == OURS else None
            llm = stack.enter_context(
                start(target, speculative_config=spec, **settings)
            )
            engines[name] = llm.llm_engine
            if spec is not None:
                drafter_of(llm).lengths.plan = lambda *_: Plan(0, [], {})
            for index in range(batch):
                prompt: Any = {"prompt_token_ids": [*_PROMPT, 300 + index]}
                llm.llm_engine.add_request(str(index), prompt, endless)
            for _ in range(3 * _STEPS):
                llm.llm_engine.step()
        for turn in range(turns):
            for name in list(times)[:: -1 if turn % 2 else 1]:
                begin = time.perf_counter()
                for _ in range(_STEPS):
                    engines[name].step()
                times[name].append((time.perf_counter() - begin) * 1e3 / _STEPS)
    return times


if __name__ == "__main__":
    # vLLM and OpenMP read them when they are loaded.
    wanted = fastest_environment(os.environ)
    if wanted:
        import sys

        os.environ.update(wanted)
        os.execv(
            sys.executable,
            [sys.executable, "-m", "tools.nothing_drafted", *sys.argv[1:]],
        )
    main()
