# SPDX-License-Identifier: Apache-2.0
"""The GPU measurement: its tables on made-up engines, and a dry run on real ones.

pytest -m slow tests/tools/gpu
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tools.gpu import measure
from vllm_mtp.metrics import AcceptanceCounts

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools" / "gpu")


class FakeSide:
    """Answers every prompt with the same tokens."""

    def __init__(self, name: str, tokens: list[int], seconds: float = 1.0) -> None:
        self.name, self.tokens, self.seconds = name, tokens, seconds
        self.kv_blocks, self.capacity, self.num_tokens = 10, 10_000, 2
        self.asked = 0
        self.llm = SimpleNamespace(reset_prefix_cache=lambda: None)

    def answer(self, prompts: list[Any], max_tokens: int, logprobs: Any = None) -> Any:
        self.asked += 1
        gaps = {5: 0.0, 6: 0.1, 7: 3.0}
        top = {token: SimpleNamespace(logprob=-gap) for token, gap in gaps.items()}
        output = SimpleNamespace(
            token_ids=self.tokens, logprobs=[top] * len(self.tokens)
        )
        counts = AcceptanceCounts(4, 8, (4, 2))
        return SimpleNamespace(
            outputs=[output] * len(prompts), counts=counts, seconds=self.seconds
        )


def test_outputs_and_speed_are_compared_with_the_first_side() -> None:
    sides = [
        FakeSide("none", [5, 5, 5]),
        FakeSide("same", [5, 5, 5], seconds=0.5),
        FakeSide("tie", [5, 6, 9]),
        FakeSide("wrong", [5, 7, 5]),
    ]
    options = argparse.Namespace(dry_run=True, rounds=3, dtype="bfloat16")
    rows = measure.turns(sides, [[1], [2], [3]], 1, options)
    found = [(row["equal"], row["tie"], row["different"]) for row in rows]
    assert found == [(2, 0, 0), (2, 0, 0), (0, 2, 0), (0, 0, 2)]
    assert [row["ratio"]["median"] for row in rows] == [1, 2, 1, 1]
    assert rows[1]["acceptance_length"] == 2.5
    assert rows[1]["first_position"] == 1.0
    options.dtype = "float32"  # there a gap of 0.1 is no tie
    assert measure.turns(sides, [[1]], 1, options)[2]["different"] == 1


def test_a_side_that_fails_or_has_no_room_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from clock import Times

    def decode(side: FakeSide, batch: int, context: int) -> Times:
        side.asked += 1
        if side.name == "dies":
            raise RuntimeError("device lost")
        return Times([side.seconds], [0.5], [0.1])

    monkeypatch.setattr(measure, "decode", decode)
    sides = [FakeSide("none", []), FakeSide("dies", []), FakeSide("ours", [], 1.5)]
    broken: dict[str, str] = {}
    rows = measure.cell(sides, 2, 100, 3, broken)
    assert [row.get("break_even") for row in rows] == [1.0, None, 1.5]
    assert rows[1]["failed"] == "RuntimeError: device lost"
    measure.cell(sides, 2, 100, 3, broken)
    assert [side.asked for side in sides] == [6, 1, 6]
    rows = measure.cell(sides, 100, 1000, 1, {})
    assert all("KV pool of 10000 tokens" in row["failed"] for row in rows)


def test_a_spread_keeps_the_outliers_out() -> None:
    spread = measure.spread_of([100.0, *map(float, range(1, 11))])
    assert spread == {"median": 6.0, "p10": 2.0, "p90": 10.0, "count": 11}


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(1200)
def test_the_dry_run_measures_every_side(tmp_path: Path) -> None:
    command = [sys.executable, "tools/gpu/measure.py", "all", "--dry-run"]
    command += ["--dtype", "float32", "--rounds", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "cost.json").read_text("utf-8"))["rows"]
    assert {row["side"] for row in rows} > {"none", "eagle3"}
    assert all(row["step_ms"]["median"] > 0 for row in rows)
    assert "shared:all" in (tmp_path / "answers.md").read_text("utf-8")
