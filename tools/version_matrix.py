# SPDX-License-Identifier: Apache-2.0
"""Test every release of vLLM that is said to work, on every runner.

For each: what our code needs is in its sources (tests/serving/test_contract.py), and
a tiny float32 target gives the same tokens as without the method, in some rows of the
matrix (tests/serving/test_matrix.py). Releases that are not installed are downloaded.

    python -m tools.version_matrix --cache .vllm-versions [--only 0.31.0-V2 ...]

The exit code is 1 when a release does not do what `vllm_mtp.serving.versions` says.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tools.vllm_sources import ensure, is_installed
from vllm_mtp.serving.versions import TABLE, Release, Status

ROOT = Path(__file__).parents[1]
TESTS = ("tests/serving/test_contract.py", "tests/serving/test_matrix.py")
SOURCES = "sources_are_those_of_the_release or all_that_our_code_needs"
# Drafters of which the first position, or with shared-1 all, must be accepted:
# where they are not, what they read of the cache is wrong.
DRAFTERS = {"V1": ["llama-shared-4"], "V2": ["llama-shared-1", "llama-mixed"]}
# Rows of the matrix that every release can run: parts of the names of its cases.
ROWS = [
    *("batches_of_4", "prompts_a_second_time", "all_at_max_model_len"),
    *("prompts_in_pieces", "preemption_some_twice"),
]
TRITON = ROOT / "tests" / "serving" / "triton_interpreter"


class Result(NamedTuple):
    """One release on one runner."""

    version: str
    runner: str
    passed: bool
    summary: str  # pytest's last line
    seconds: float


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="for the downloads")
    parser.add_argument("--only", nargs="*", help="these, as 0.31.0-V2; default: all")
    options = parser.parse_args()
    cache: Path = options.cache.resolve()
    results = []
    for release in TABLE:
        for runner in claimed(release):
            if options.only and f"{release.version}-{runner}" not in options.only:
                continue
            results.append(run(release, runner, cache))
            print(line(results[-1]), flush=True)
    print("\n" + "\n".join(map(line, results)))
    return exit_code(results)


def claimed(release: Release) -> list[str]:
    """The runners that are said to work."""
    return [
        name
        for name, runner in release.runners.items()
        if runner.status is Status.TESTED
    ]


def run(release: Release, runner: str, cache: Path) -> Result:
    """The tests of one release on one runner; their output goes to a log."""
    start = time.monotonic()
    try:
        folders = [] if is_installed(release) else [ensure(release, cache)]
    except subprocess.CalledProcessError:  # pip has said why
        return Result(release.version, runner, False, "not downloaded", 0.0)
    cache.mkdir(parents=True, exist_ok=True)
    log = cache / f"{release.version}-{runner}.log"
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", *TESTS, *selection(runner)],
            env=environment(runner, folders),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    lines = log.read_text("utf-8", errors="replace").strip().splitlines() or ["nothing"]
    passed = done.returncode == 0
    # Libraries may have the last word.
    counted = [line for line in lines if " passed" in line or " failed" in line]
    summary = (counted or lines)[-1] + ("" if passed else f" (see {log})")
    seconds = time.monotonic() - start
    return Result(release.version, runner, passed, summary, seconds)


def selection(runner: str) -> list[str]:
    """pytest's arguments that choose the tests."""
    cases = f"({' or '.join(DRAFTERS[runner])}) and ({' or '.join(ROWS)})"
    # Also cases of the matrix that are not in every run.
    return ["-k", f"{SOURCES} or {cases}", "-m", "not slow"]


def environment(runner: str, folders: Iterable[Path]) -> dict[str, str]:
    """The environment that chooses the release and the runner."""
    path = [str(folder) for folder in folders]
    if runner == "V2":
        path.append(str(TRITON))
    path += filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "V2" else "0",
    }


def line(result: Result) -> str:
    """One line of the table."""
    verdict = "passed" if result.passed else "FAILED"
    return (
        f"vLLM {result.version:<8} {result.runner}  {verdict}  {result.seconds:4.0f} s"
        f"  {result.summary}"
    )


def exit_code(results: list[Result]) -> int:
    """0 when every release does what the table says, and one was run."""
    if not results:
        print("no release to test", file=sys.stderr)
    return int(not results or not all(result.passed for result in results))


if __name__ == "__main__":
    sys.exit(main())
