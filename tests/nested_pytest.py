# SPDX-License-Identifier: Apache-2.0
"""A second pytest in a process of its own, and what it says."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

MAX_TAIL = 6000  # characters of the output, where there is no better report
ROOT = Path(__file__).parents[1]


class Report(NamedTuple):
    """What a run gave.

    Attributes:
        returncode: pytest's; 124 where it took too long.
        passed: How many tests passed.
        failures: Name, and what pytest says, of each test that failed or broke off.
        seconds: By test, the slowest first.
        tail: The end of the output.
    """

    returncode: int
    passed: int
    failures: dict[str, str]
    seconds: dict[str, float]
    tail: str

    @property
    def is_good(self) -> bool:
        """Something was tested, and nothing failed."""
        return self.returncode == 0 and self.passed > 0 and not self.failures

    def __str__(self) -> str:
        """All failures; the output's end only where no test is to blame."""
        slow = list(self.seconds.items())[:8]
        numbers = f"{self.passed} passed, {len(self.failures)} failed"
        parts = [
            f"exit code {self.returncode}, {numbers}",
            *(f"{name}\n{text}" for name, text in self.failures.items()),
            *([] if self.is_good or self.failures else [self.tail]),
            "slowest: " + ", ".join(f"{name} {took:.0f} s" for name, took in slow),
        ]
        return "\n\n".join(parts)


def run_pytest(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path, limit: float
) -> Report:
    """Run pytest at the repository's root.

    Args:
        arguments: pytest's.
        environment: The whole environment.
        folder: For its log and its report.
        limit: Seconds after which it is ended.
    """
    log, xml = folder / "pytest.log", folder / "pytest.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={xml}"]
    with log.open("wb") as output:
        try:
            returncode = subprocess.run(
                [*command, *arguments],
                env=dict(environment),
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            returncode = 124
    tail = log.read_text("utf-8", "replace")[-MAX_TAIL:]
    cases = list(ET.parse(xml).iter("testcase")) if xml.exists() else []
    return Report(returncode, *_read(cases), tail)


def _read(
    cases: Sequence[ET.Element],
) -> tuple[int, dict[str, str], dict[str, float]]:
    failures: dict[str, str] = {}
    seconds: dict[str, float] = {}
    passed = 0
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        seconds[name] = seconds.get(name, 0.0) + float(case.get("time", 0))
        bad = [*case.findall("failure"), *case.findall("error")]
        if bad:
            texts = [part.text or part.get("message") or "" for part in bad]
            # Cut at the start: what pytest raises stands at the end.
            failures[name] = "\n".join(text[-MAX_TAIL:] for text in texts)
        elif case.find("skipped") is None:
            passed += 1
    by_time = sorted(seconds.items(), key=lambda item: -item[1])
    return passed, failures, dict(by_time)
