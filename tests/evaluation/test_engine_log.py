# SPDX-License-Identifier: Apache-2.0
"""What engines print stays off the screen, but for a failure."""

import os
import subprocess
import sys

import pytest

from vllm_mtp.errors import MTPError
from vllm_mtp.evaluation.engine_log import engine_log

NOISE = "import sys; print('out'); print('err', file=sys.stderr)"
# As an engine does: it is started inside, and prints behind the block too.
LATE = "import sys; sys.stdin.read(); " + NOISE


def test_the_screen_stays_clean(capfd: pytest.CaptureFixture[str]) -> None:
    with engine_log() as log:
        os.write(1, b"before\n")
        with log.taking():
            os.write(2, b"ours\n")
            child = subprocess.Popen(
                [sys.executable, "-c", LATE], stdin=subprocess.PIPE
            )
        os.write(2, b"between\n")
        child.communicate()
        assert log.text().split() == ["ours", "out", "err"]
    os.write(1, b"after\n")
    assert capfd.readouterr() == ("before\nafter\n", "between\n")


def fail(error: Exception) -> None:
    with engine_log() as log, log.taking():
        subprocess.run([sys.executable, "-c", NOISE], check=True)
        raise error


def test_a_failure_shows_what_was_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="see above"):
        fail(RuntimeError("see above"))
    out, err = capfd.readouterr()
    assert out == ""
    assert set(err.split()) == {"out", "err"}


def test_a_refusal_needs_no_log(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MTPError):
        fail(MTPError("what to do"))
    assert capfd.readouterr() == ("", "")
