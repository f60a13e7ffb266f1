# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp generate``, interrupted at random moments, ends with 130 and goes on.

Every run tries a few moments. To try fifty:

    pytest -m slow tests/data/test_interrupted.py
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.data.conftest import WriteJsonl
from tests.data.test_resume import arguments, rows
from vllm_mtp.data.store import GENERATION_FILE, read_provenance

pytest.importorskip("vllm")
pytest.importorskip("datasets")
pytestmark = pytest.mark.engine

NUM_PROMPTS = 80
MOST_SECONDS = 120
# Until `main` runs, an interrupt is Python's own.
STARTED = """
import sys
from vllm_mtp.cli.main import main
print("started", flush=True)
sys.exit(main())
"""


class Run(NamedTuple):
    """One run of the command."""

    code: int
    text: str
    seconds: float  # from the start
    left: float  # from the interrupt to the end


def run(
    command: list[str],
    moment: float | None = None,
    when: Callable[[], bool] = lambda: True,
    code: str = STARTED,
) -> Run:
    """Run the command; interrupt it at a moment, or when something is so.

    Args:
        command: Its arguments.
        moment: Seconds from the start, if the command takes so long.
        when: What must be so before that.
        code: What calls it, and says when it has started.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:  # behind what vLLM says of the machine
            if line == "started\n":
                break
        start = interrupted = time.monotonic()
        if moment is not None:
            while process.poll() is None and not (
                time.monotonic() > start + moment and when()
            ):
                time.sleep(0.005)
            process.send_signal(signal.SIGINT)
            interrupted = time.monotonic()
        text = process.stdout.read()  # `communicate` would miss what is read already
        process.wait(MOST_SECONDS)
    finally:
        process.kill()
    end = time.monotonic()
    return Run(process.returncode, text, end - start, end - interrupted)


@pytest.fixture
def prompts(write_jsonl: WriteJsonl) -> Path:
    return write_jsonl(
        [{"prompt": f"{n}: " + "word " * (n % 9)} for n in range(NUM_PROMPTS)]
    )


@pytest.fixture
def whole(chat_target: Path, prompts: Path, tmp_path: Path) -> Run:
    """An unbroken run into the folder ``whole``."""
    done = run(arguments(chat_target, prompts, tmp_path / "whole", 1.0))
    assert done.code == 0, done.text
    return done


def check(whole: Path, out: Path) -> None:
    assert rows(out) == rows(whole)
    assert read_provenance(out) == read_provenance(whole)


@pytest.mark.parametrize(
    "count", [4, pytest.param(50, marks=pytest.mark.slow)], ids=["few", "fifty"]
)
@pytest.mark.timeout(3000)
def test_every_moment_ends_with_130_and_the_rows_are_the_same(
    count: int,
    whole: Run,
    chat_target: Path,
    prompts: Path,
    tmp_path: Path,
) -> None:
    chosen, number, slowest = random.Random(count), 0, 0.0
    codes: list[int] = []
    for part in range(count):
        # One in each part of the time that an unbroken run takes.
        moment = (part + chosen.random()) / count * whole.seconds
        out = tmp_path / f"out-{number}"
        found = run(arguments(chat_target, prompts, out, 1.0), moment)
        told = f"after {moment:.2f} s, exit code {found.code}: {found.text}"
        assert found.code in (0, 130), told
        assert "Traceback" not in found.text, told
        assert "Exception ignored" not in found.text, told
        if found.code:
            assert "vllm-mtp generate: interrupted" in found.text, told
        slowest = max(slowest, found.left)
        codes.append(found.code)
        if (out / GENERATION_FILE).exists():
            check(tmp_path / "whole", out)
            number += 1
    out = tmp_path / f"out-{number}"
    assert run(arguments(chat_target, prompts, out, 1.0)).code == 0
    check(tmp_path / "whole", out)
    assert codes.count(130) > count / 2
    print(
        f"{codes.count(130)} of {count} interrupted, {codes.count(0)} had finished; "
        f"{number + 1} folders; at most {slowest:.1f} s to the end"
    )


SWALLOWS = """
import sys, time
from vllm import LLMEngine
step = LLMEngine.step

def swallowing(engine):
    try:
        time.sleep(0.5)  # the interrupt comes here
    except BaseException:
        raise RuntimeError("cannot schedule new futures") from None
    return step(engine)

LLMEngine.step = swallowing
print("started", flush=True)
from vllm_mtp.cli.main import main
sys.exit(main())
"""


def test_what_vllm_makes_of_an_interrupt_does_not_matter(
    chat_target: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = arguments(chat_target, prompts, out, 1.0)
    found = run(command, 0.0, lambda: bool(list(out.glob("parts/*"))), code=SWALLOWS)
    assert found.code == 130, found.text
    assert "Traceback" not in found.text
    assert "the same command goes on with what is in" in found.text
