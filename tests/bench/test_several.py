# SPDX-License-Identifier: Apache-2.0
"""Reports of several machines in one table."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_mtp.bench.several import side_by_side
from vllm_mtp.cli.main import main
from vllm_mtp.errors import MTPError


def line(load: str, side: str, ratio: float, **more: Any) -> dict[str, Any]:
    spread = {"median": ratio, "low": ratio - 0.1, "high": ratio + 0.1}
    return {"load": load, "side": side, "ratio": spread, **more}


def stage(title: str, *lines: dict[str, Any]) -> dict[str, Any]:
    return {"title": title, "plan": {"dtype": "float32"}, "lines": lines}


def save(folder: Path, device: str, *stages: dict[str, Any]) -> str:
    folder.mkdir()
    report = {"machine": {"device": device}, "stages": stages}
    (folder / "benchmark.json").write_text(json.dumps(report))
    return str(folder / "benchmark.json")


@pytest.fixture
def intel(tmp_path: Path) -> str:
    lines = (
        line("1 at once", "none", 1.0, verdict=None),
        line("1 at once", "ours auto", 1.3, verdict="faster"),
        line("1 at once", "none again", 1.0, verdict=None),
    )
    return save(
        tmp_path / "a", "CPU, 2 cores, Intel Xeon", stage("Side by side", *lines)
    )


def test_the_ratios_stand_side_by_side(
    intel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = stage(  # without verdicts or a control
        "Side by side",
        line("1 at once", "none", 1.0),
        line("1 at once", "ours auto", 0.9),
        line("1 at once", "ours k=2", 0.8),
    )
    amd = save(tmp_path / "b", "CPU, 4 cores, AMD EPYC", old)
    assert main(["bench", "--show", intel, amd]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| Load | Side | 2 cores, Intel Xeon, float32 | 4 cores, AMD EPYC, float32 |",
        "| --- | --- | --- | --- |",
        "| 1 at once | ours auto | 1.30 (1.20 to 1.40), faster | 0.90 (0.80 to 1.00) |",
        "| 1 at once | none again | 1.00 (0.90 to 1.10) | |",
        "| 1 at once | ours k=2 | | 0.80 (0.70 to 0.90) |",
    ]


def test_stages_and_reports_of_one_machine_are_told_apart(
    intel: str, tmp_path: Path
) -> None:
    both = (
        stage("Side by side", line("1 at once", "none again", 1.1)),
        stage("Calibrated", line("1 at once", "none again", 0.9)),
    )
    again = save(tmp_path / "b", "CPU, 2 cores, Intel Xeon", *both)
    head, _, *rows = side_by_side([intel, again]).splitlines()
    name = "2 cores, Intel Xeon, float32"
    assert head == f"| Stage | Load | Side | {name} (a) | {name} (b) |"
    assert rows[1:] == [
        (
            "| Side by side | 1 at once | none again | 1.00 (0.90 to 1.10) | "
            "1.10 (1.00 to 1.20) |"
        ),
        "| Calibrated | 1 at once | none again | | 0.90 (0.80 to 1.00) |",
    ]


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"machine": {"device": "a"}, "stages": []}', '"a"']
)
def test_another_file_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "benchmark.json"
    with pytest.raises(MTPError, match=f"--show {path}: cannot be read"):
        side_by_side([str(path)])
    path.write_text(text)
    with pytest.raises(MTPError, match=f"--show {path}: no report of this command"):
        side_by_side([str(path)])
