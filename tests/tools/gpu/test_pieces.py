# SPDX-License-Identifier: Apache-2.0
"""What the pieces of the GPU run find in made-up engines."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import cost
import exact
import pytest
import results
from clock import Times
from engine import Answers, Replays

from vllm_mtp.metrics import AcceptanceCounts

GOOD = {
    "side": exact.WHOLE,
    "different": 0,
    "drafts": 100,
    "first_accepted": 100,
    "failed_drafts": 0,
    "draft_calls": 30,
    "draft_graphs": True,
    "drafter_replays": 30,
    "target_graphs": True,
    "target_replays": 25,
}


def test_a_good_row_has_no_faults() -> None:
    assert exact.faults_of(GOOD, "float32", captured=True) == []
    alone = GOOD | {"side": "none", "drafts": 0, "draft_graphs": False}
    alone |= {"drafter_replays": 0, "draft_calls": 0}
    assert exact.faults_of(alone, "float32", captured=True) == []
    on_cpu = alone | {"target_replays": 0}
    assert exact.faults_of(on_cpu, "float32", captured=False) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"different": 1}, "not the target's"),
        ({"drafts": 0}, "nothing was drafted"),
        ({"first_accepted": 90}, "first drafts of the whole target"),
        ({"failed_drafts": 1}, "drafts failed"),
        ({"drafter_replays": 29}, "30 replays of the drafter"),
        ({"drafter_replays": 0}, "30 replays of the drafter"),
        ({"draft_graphs": False}, "0 replays of the drafter"),
        ({"target_replays": 0}, "the target's graphs"),
        ({"target_graphs": False}, "the target's graphs"),
    ],
)
def test_each_fault_is_named(change: dict[str, Any], fault: str) -> None:
    (found,) = exact.faults_of(GOOD | change, "float32", captured=True)
    assert fault in found


def answers(*texts: list[int]) -> Answers:
    gaps = {5: 0.0, 6: 0.1, 7: 3.0}
    top = {token: SimpleNamespace(logprob=-gap) for token, gap in gaps.items()}
    outputs = [SimpleNamespace(token_ids=t, logprobs=[top] * len(t)) for t in texts]
    counts = AcceptanceCounts(4, 8, (4, 2))
    return Answers(outputs, counts, Replays(3, 2), calls=4)


def test_answers_are_compared_with_the_targets() -> None:
    alone = answers([5, 5, 5], [5, 5, 5], [5, 5, 5])
    mine = answers([5, 5, 5], [5, 6, 9], [5, 7, 5])
    row = exact.compared(alone, mine, "bfloat16")
    assert (row["equal"], row["tie"], row["different"]) == (1, 1, 1)
    assert (row["first_accepted"], row["acceptance_length"]) == (4, 2.5)
    assert (row["target_replays"], row["drafter_replays"]) == (3, 2)
    # In float32 a gap of 0.1 is no tie.
    assert exact.compared(alone, mine, "float32")["different"] == 2


class FakeSide:
    name, kv_blocks, capacity, num_tokens, failed_drafts = "ours", 10, 10_000, 2, 0

    def without_draft_graphs(self) -> Any:
        self.without = True
        return nullcontext()


def test_a_cell_tells_what_it_could_not_measure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    side: Any = FakeSide()
    found = Times([2.0], [1.0], [0.5])
    monkeypatch.setattr(cost, "decode", lambda *_: (found, Replays(9, 9)))
    rows = cost.cell(side, 2, 100, [False, True], dry=False)
    assert [row["draft_ms"]["count"] for row in rows] == [2, 2]
    assert all("failed" not in row for row in rows)
    assert side.without
    (row,) = cost.cell(side, 100, 1000, [True], dry=False)
    assert "KV pool of 10000 tokens" in row["failed"]
    side.failed_drafts = 1
    (row,) = cost.cell(side, 2, 100, [True], dry=False)
    assert row["failed"] == "1 drafts failed; the log says why"
    side.failed_drafts = 0
    monkeypatch.setattr(cost, "decode", lambda *_: (Times(), Replays()))
    (row,) = cost.cell(side, 2, 100, [True], dry=False)
    assert row["failed"] == "no step in which all requests decode"


def test_graphs_that_were_not_replayed_are_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    side: Any = FakeSide()
    monkeypatch.setattr(cost.torch.cuda, "is_available", lambda: True)
    for replays, good in (
        (Replays(9, 9), [False, True]),
        (Replays(9, 0), [True, False]),
    ):
        found = Times([2.0], [1.0], [0.5])
        monkeypatch.setattr(cost, "decode", lambda *_, f=found, r=replays: (f, r))
        rows = cost.cell(side, 2, 100, [False, True], dry=True)
        assert ["failed" not in row for row in rows] == good


def test_a_step_is_divided_by_the_targets_own_in_the_same_cell() -> None:
    def row(side: str, batch: int, median: float) -> dict[str, Any]:
        step = {"median": median}
        return {"side": side, "batch": batch, "context": 40, "step_ms": step}

    rows = [row("none", 1, 2.0), row("ours", 1, 3.0), row("ours", 8, 3.0)]
    found = results.with_break_even(rows)
    assert [r.get("break_even") for r in found] == [1.0, 1.5, None]


def test_a_spread_keeps_the_outliers_out() -> None:
    spread = results.spread_of([100.0, *map(float, range(1, 11))])
    assert spread == {"median": 6.0, "p10": 2.0, "p90": 10.0, "count": 11}
