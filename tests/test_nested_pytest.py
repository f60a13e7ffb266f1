# SPDX-License-Identifier: Apache-2.0
"""What a nested pytest finds is told, test by test."""

import os
from pathlib import Path

from tests.nested_pytest import Report, run_pytest

TESTS = """
import os, time
import pytest

@pytest.fixture
def broken():
    raise OSError("no fixture")

def test_good():
    pass

@pytest.mark.skip
def test_skipped():
    pass

@pytest.mark.parametrize("number", [1, 2])
def test_bad(number):
    assert number == 7, "not seven" + " at all" * 2000

def test_breaks_off(broken):
    pass

def test_hangs():
    time.sleep(60)

def test_dies():
    os.abort()
"""


def run(folder: Path, chosen: str, limit: float = 60.0) -> Report:
    (folder / "test_made.py").write_text(TESTS, "utf-8")
    arguments = [str(folder / "test_made.py"), "-k", chosen, "-p", "no:cacheprovider"]
    return run_pytest([*arguments, f"--rootdir={folder}"], os.environ, folder, limit)


def test_every_failure_is_told(tmp_path: Path) -> None:
    report = run(tmp_path, "good or skipped or bad or breaks")
    assert (report.returncode, report.passed) == (1, 1)
    assert not report.is_good
    names = [name.rpartition("::")[2] for name in report.failures]
    assert names == ["test_bad[1]", "test_bad[2]", "test_breaks_off"]
    for text in ("1 passed, 3 failed", "test_bad[2]", "at all", "no fixture"):
        assert text in str(report)
    assert "slowest: " in str(report)


def test_all_is_well(tmp_path: Path) -> None:
    report = run(tmp_path, "good or skipped")
    assert report.is_good
    assert str(report).startswith("exit code 0, 1 passed, 0 failed")


def test_nothing_tested_is_not_well(tmp_path: Path) -> None:
    assert not run(tmp_path, "skipped").is_good
    nothing = run(tmp_path, "no_such_test")
    assert not nothing.is_good
    assert "deselected" in str(nothing)


def test_a_run_that_hangs_or_dies_shows_its_output(tmp_path: Path) -> None:
    hung = run(tmp_path, "hangs", limit=5.0)
    assert (hung.returncode, hung.is_good) == (124, False)
    died = run(tmp_path, "dies")
    assert not died.is_good
    assert "Aborted" in str(died)
