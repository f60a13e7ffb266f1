# SPDX-License-Identifier: Apache-2.0
"""Measure what having the plugin installed costs a vLLM that does not use it.

python -m tools.startup_ratio [--rounds 9] [--engine-rounds 5]

Fresh processes, with the plugin and without it (VLLM_PLUGINS="") in turns. Printed
are the medians, their ratio, and the smallest and largest ratio of a round: a
difference within that spread cannot be told from nothing.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.tiny_targets import make_tiny_llama

CONFIG = """
import sys, time
start = time.perf_counter()
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.engine.arg_utils import EngineArgs
EngineArgs(model=sys.argv[1], skip_tokenizer_init=True).create_engine_config()
print(time.perf_counter() - start)
"""
ENGINE = """
import sys, time
start = time.perf_counter()
from vllm import LLM
LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
    max_model_len=256, max_num_seqs=8)
print(time.perf_counter() - start)
"""


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--engine-rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target = make_tiny_llama(Path(folder))
        measure("imports and engine config", CONFIG, target, args.rounds)
        measure("whole engine, tiny target", ENGINE, target, args.engine_rounds)


def measure(name: str, code: str, target: Path, rounds: int) -> None:
    """Print one line for ``code``, which prints its seconds last."""
    seconds(code, target, {})  # fills the disk's cache
    pairs = []
    for number in range(rounds):
        # Whichever comes second may find a warmer machine.
        order = [{}, {"VLLM_PLUGINS": ""}]
        if number % 2:
            order.reverse()
        times = {len(env): seconds(code, target, env) for env in order}
        pairs.append((times[0], times[1]))
    with_it, without = (
        statistics.median(column) for column in zip(*pairs, strict=True)
    )
    ratios = [a / b for a, b in pairs]
    print(
        f"{name}: {with_it:.2f} s with the plugin, {without:.2f} s without; ratio "
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, "
        f"{rounds} rounds)",
        flush=True,
    )


def seconds(code: str, target: Path, environment: dict[str, str]) -> float:
    """What one fresh process says that it took."""
    inherited = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"}
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)],
        env=defaults | inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
