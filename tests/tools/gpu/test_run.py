# SPDX-License-Identifier: Apache-2.0
"""The GPU run's plan, budget and results, with made-up pieces; and its dry run.

pytest -m slow tests/tools/gpu
"""

import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import plan
import pytest
import results
import run

ROOT = Path(__file__).parents[3]

# Stands for piece.py: records a row, then does what its name says.
STAND_IN = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT / "tools/gpu")!r})
from pathlib import Path
from results import append
name, out = sys.argv[1], Path(sys.argv[3])
append(out, {{"piece": name, "side": "ours", "pid": os.getpid()}})
if name == "hangs":
    time.sleep(60)
if name == "crashes":
    os.abort()
if name == "raises":
    raise RuntimeError("device lost")
if name == "check":
    append(out, {{"piece": name, "faults": "vllm: no module x\\nmore"}})
sys.exit(name == "check")
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "piece.py"
    script.write_text(STAND_IN, "utf-8")
    monkeypatch.setattr(run, "SCRIPT", script)
    return script


def piece(name: str, estimate: int = 0, limit: int = 60, needed: bool = True) -> Any:
    return plan.Piece(name, "something", estimate, limit, needed)


def run_all(
    out: Path, pieces: list[Any], seconds: float = 60
) -> tuple[bool, dict[str, Any]]:
    results.append(out, {"facts": {"device": "none"}})
    ok = run.run_all(pieces, out, False, time.monotonic() + seconds)
    rows = results.read(out)
    return ok, {row["piece"]: row for row in rows if "status" in row}


def test_the_needed_pieces_fit_into_what_is_lent() -> None:
    before = sum(seconds for _, seconds in plan.BEFORE)
    assert before + plan.needed_seconds() <= plan.MOST <= 12 * 60 < plan.LEASE
    assert plan.needed_seconds() <= plan.BUDGET
    # No command may take longer than 600 s there.
    assert before + plan.BUDGET <= plan.LEASE
    assert plan.BUDGET < 600
    assert plan.PIECES[0].name == "check"
    for item in plan.PIECES:
        assert 0 < item.estimate < item.limit
    needed = [item.needed for item in plan.PIECES]
    assert needed == sorted(needed, reverse=True)
    assert f"{before + plan.needed_seconds()} s" in plan.describe()


def test_what_comes_after_the_deadline_is_reported_as_skipped(
    stand_in: Path, tmp_path: Path
) -> None:
    pieces = [piece("first"), piece("long", 50), piece("last", 1, needed=False)]
    ok, statuses = run_all(tmp_path, pieces, seconds=20)
    assert not ok
    assert [status["status"] for status in statuses.values()] == [
        *("done", "skipped", "done")
    ]
    assert "it takes about 50 s" in statuses["long"]["reason"]
    assert "skipped" in (tmp_path / results.TABLES).read_text("utf-8")
    # A needed one is begun, since what it finds is kept; another is not, and may be
    # left out.
    assert plan.why_skipped(piece("half", 100), 50) is None
    assert plan.why_skipped(piece("half", 100, needed=False), 99)
    folder = tmp_path / "other"
    folder.mkdir()
    ok, _ = run_all(folder, [piece("first"), piece("more", 50, needed=False)], 20)
    assert ok


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("hangs", "timeout", "what it found is kept"),
        ("crashes", "failed", "SIGABRT"),
        ("raises", "failed", "RuntimeError: device lost"),
    ],
)
def test_a_piece_that_fails_keeps_its_rows_and_the_others_go_on(
    name: str, status: str, reason: str, stand_in: Path, tmp_path: Path
) -> None:
    ok, statuses = run_all(tmp_path, [piece(name, limit=2), piece("last")])
    assert not ok
    assert statuses[name]["status"] == status
    assert reason in statuses[name]["reason"]
    assert statuses["last"]["status"] == "done"
    found = [row for row in results.read(tmp_path) if row.get("side") == "ours"]
    assert [row["piece"] for row in found] == [name, "last"]
    assert f"## {name}" in (tmp_path / results.TABLES).read_text("utf-8")
    with pytest.raises(ProcessLookupError):
        os.kill(found[0]["pid"], 0)


def test_nothing_is_tried_where_the_check_fails(stand_in: Path, tmp_path: Path) -> None:
    ok, statuses = run_all(tmp_path, [piece("check"), piece("last")])
    assert not ok
    assert statuses["check"]["reason"] == "vllm: no module x"
    assert statuses["last"]["reason"] == "check did not pass"


def test_a_run_that_is_ended_loses_nothing_and_leaves_no_process(
    stand_in: Path, tmp_path: Path
) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tools/gpu")!r})
from pathlib import Path
import plan, run
run.SCRIPT = Path({str(stand_in)!r})
run.PIECES = [plan.Piece("first", "", 0, 60), plan.Piece("hangs", "", 0, 60)]
run.NAMES = ["first", "hangs"]
run.why_impossible = lambda dry: None
sys.exit(run.main(["--dry-run", "--out", sys.argv[1]]))
"""
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, str(out)])
    found: list[Any] = []
    end = time.monotonic() + 60
    while len(found) < 2 and time.monotonic() < end:
        time.sleep(0.05)
        if (out / results.ROWS).exists():
            found = [row for row in results.read(out) if "pid" in row]
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    rows = results.read(out)
    assert [row["piece"] for row in rows if "pid" in row] == ["first", "hangs"]
    assert "## first" in (out / results.TABLES).read_text("utf-8")
    with pytest.raises(ProcessLookupError):
        os.kill(found[1]["pid"], 0)


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    results.append(tmp_path, {"facts": {}})
    with (tmp_path / results.ROWS).open("a", encoding="utf-8") as file:
        file.write('{"piece": "cos')
    assert results.read(tmp_path) == [{"facts": {}}]


def no_module(name: str) -> None:
    return None


def no_library(name: str) -> None:
    raise OSError(name)


@pytest.mark.parametrize(
    ("module", "attribute", "value", "said"),
    [
        (importlib.util, "find_spec", no_module, "no module torch, vllm"),
        (ctypes, "CDLL", no_library, "no NVIDIA GPU here"),
    ],
)
def test_a_machine_that_cannot_run_it_is_told_so_in_one_line(
    module: Any,
    attribute: str,
    value: Any,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, attribute, value)
    assert run.main(["--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_results_of_another_run_are_not_added_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results.append(tmp_path, {"facts": {}})
    with pytest.raises(SystemExit, match="2"):
        run.main(["--dry-run", "--out", str(tmp_path)])
    assert "of another run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(2000)
def test_the_dry_run_does_every_needed_piece(tmp_path: Path) -> None:
    command = [sys.executable, "tools/gpu/run.py", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = (tmp_path / results.ROWS).read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert "CUDA graphs" in rows[0]["facts"]["did not run"]
    statuses = {row["piece"]: row["status"] for row in rows if "status" in row}
    assert statuses == {item.name: "done" for item in plan.PIECES if item.needed}
    costs = [row for row in rows if "step_ms" in row]
    assert {row["piece"] for row in costs} == {
        *("cost-target", "cost-own", "cost-eagle3")
    }
    assert all(row["step_ms"]["median"] > 0 for row in costs)
    assert any(row.get("first_accepted", 0) > 0 for row in rows)
