# SPDX-License-Identifier: Apache-2.0
"""Measure what having the plugin installed costs a vLLM that does not use it.

python -m tools.startup_ratio [--rounds 9] [--engine-rounds 5]

Fresh processes, with the plugin and without it (VLLM_PLUGINS="") in turns. Printed
are the medians, the median ratio, and the smallest and largest ratio of a round: a
difference within that spread cannot be told from nothing. CPU time is the steadier of
the two measures on a machine that does other work.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.tiny_targets import make_tiny_llama
from tools.command import Parser, count_or_none

CONFIG = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.engine.arg_utils import EngineArgs
EngineArgs(model=sys.argv[1], skip_tokenizer_init=True).create_engine_config()
"""
ENGINE = """
from vllm import LLM
LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
    max_model_len=256, max_num_seqs=8)
"""
TIMED = """
import sys, time
start, cpu_start = time.perf_counter(), time.process_time()
{code}
print(time.perf_counter() - start, time.process_time() - cpu_start)
"""
Times = tuple[float, float]  # wall and CPU seconds


def main() -> None:
    """Run from the command line."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=count_or_none, default=9)
    parser.add_argument("--engine-rounds", type=count_or_none, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target = make_tiny_llama(Path(folder))
        compare("imports and engine config", CONFIG, target, args.rounds)
        compare("whole engine, tiny target", ENGINE, target, args.engine_rounds)


def compare(name: str, code: str, target: Path, rounds: int) -> None:
    """Print one line per measure for ``code``."""
    if rounds == 0:
        return
    times_of(code, target, {})  # fills the disk's cache
    with_it: list[Times] = []
    without: list[Times] = []
    for number in range(rounds):
        sides = [(with_it, {}), (without, {"VLLM_PLUGINS": ""})]
        # Whichever comes second may find a warmer machine.
        for times, environment in sides[:: -1 if number % 2 else 1]:
            times.append(times_of(code, target, environment))
    for index, measure in enumerate(("wall", "CPU")):
        a, b = [t[index] for t in with_it], [t[index] for t in without]
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        print(
            f"{name}, {measure}: {statistics.median(a):.2f} s with the plugin, "
            f"{statistics.median(b):.2f} s without; ratio "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, "
            f"{rounds} rounds)",
            flush=True,
        )


def times_of(code: str, target: Path, environment: dict[str, str]) -> Times:
    """What one fresh process says that it took."""
    inherited = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"}
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    done = subprocess.run(
        [sys.executable, "-c", TIMED.format(code=code), str(target)],
        env=defaults | inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    wall, cpu = done.stdout.strip().splitlines()[-1].split()
    return float(wall), float(cpu)


if __name__ == "__main__":
    main()
