# SPDX-License-Identifier: Apache-2.0
"""Records to medians, ratios and verdicts, schedules and reports."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_mtp.bench.client import LoadResult
from vllm_mtp.bench.loads import CONTEXT
from vllm_mtp.bench.measure import Record
from vllm_mtp.bench.plan import (
    Load,
    Plan,
    Side,
    calibrated_side,
    control_side,
    drafter_side,
    plain_side,
    require_enough,
)
from vllm_mtp.bench.report import Report, Stage, markdown, write
from vllm_mtp.bench.step_profile import StepProfile, table
from vllm_mtp.bench.summary import (
    Spread,
    best_schedule,
    lines_of,
    speed_record,
    step_rows,
)
from vllm_mtp.errors import MTPError
from vllm_mtp.metrics import AcceptanceCounts
from vllm_mtp.serving.settings import checked

OURS = tuple(drafter_side("ours", "/drafters/ours", k) for k in (1, 2, 4))
LOADS = (Load("1 at once", ("a", "b"), 1, 8), Load("4 at once", ("a",) * 4, 4, 8))
PLAN = Plan("/targets/tiny", "float32", 256, 2, (plain_side(), OURS[1]), LOADS)


def record(side: Side, load: Load, number: int, speed: float, ttft: float) -> Record:
    drafting = side.speculative_config is not None
    counts = (
        AcceptanceCounts(10, 20, (6, 3)) if drafting else AcceptanceCounts(0, 0, ())
    )
    texts = tuple(f"answer {i}" for i in range(len(load.prompts)))
    result = LoadResult(speed, 16, 16 / speed, ttft, 900 / speed, texts)
    return Record(side.name, load.name, number, result, counts, 0, 0)


@pytest.fixture
def records() -> list[Record]:
    """The machine is half as fast in the second round; the ratios are 1.5 and 1.7."""
    plain, ours = PLAN.sides
    return [
        found
        for load in LOADS
        for found in (
            record(ours, load, 1, 8.5, 220.0),
            record(plain, load, 0, 10.0, 100.0),
            record(plain, load, 1, 5.0, 200.0),
            record(ours, load, 0, 15.0, 90.0),
        )
    ]


def test_ratios_are_taken_within_a_round(records: list[Record]) -> None:
    lines = lines_of(PLAN, records)
    assert [(line.load, line.side) for line in lines] == [
        (load.name, side.name) for load in LOADS for side in PLAN.sides
    ]
    plain, ours = lines[:2]
    assert plain.ratio.low == plain.ratio.high == 1
    assert ours.ratio.low == pytest.approx(1.5)
    assert ours.ratio.high == pytest.approx(1.7)
    assert ours.ttft_ratio.median == pytest.approx(1.0)
    assert ours.tpot_ratio is not None
    assert ours.tpot_ratio.high == pytest.approx(1 / 1.5)
    assert ours.tpot_ratio.low == pytest.approx(1 / 1.7)
    assert ours.counts == AcceptanceCounts(20, 40, (12, 6))
    assert (ours.same_texts, ours.texts) == (4, 4)


CONTROLLED = replace(PLAN, sides=(*PLAN.sides, control_side()))


@pytest.fixture
def controlled(records: list[Record]) -> list[Record]:
    """With a control of 0.95 and 1.1 at one request, 1.55 and 2 at four."""
    speeds = (9.5, 5.5), (15.5, 10.0)
    return records + [
        record(control_side(), load, number, speed, 100.0)
        for load, row in zip(LOADS, speeds, strict=True)
        for number, speed in enumerate(row)
    ]


def test_the_control_is_measured_and_the_verdict_is_beside_it(
    controlled: list[Record],
) -> None:
    lines = {(line.load, line.side): line for line in lines_of(CONTROLLED, controlled)}
    control = lines["1 at once", "none again"]
    assert (control.ratio.low, control.ratio.high) == pytest.approx((0.95, 1.1))
    assert lines["1 at once", "ours k=2"].verdict == "faster"
    # 1.6 too, but there the control has as much.
    assert lines["4 at once", "ours k=2"].verdict == "within"
    for load in LOADS:
        assert lines[load.name, "none"].verdict is None
        assert lines[load.name, "none again"].verdict is None


@pytest.mark.parametrize(
    ("median", "verdict"),
    [(0.89, "slower"), (0.9, "within"), (1.0, "within"), (1.1, "within")]
    + [(1.11, "faster")],
)
def test_a_verdict_needs_a_median_beyond_all_of_the_control(
    median: float, verdict: str
) -> None:
    control = Spread(1.0, 0.9, 1.1)
    assert Spread(median, 0.5, 1.5).verdict_beside(control) == verdict


def test_without_a_range_of_the_control_there_is_no_verdict(
    records: list[Record], controlled: list[Record]
) -> None:
    assert {line.verdict for line in lines_of(PLAN, records)} == {None}
    one_round = [record for record in controlled if record.round == 0]
    assert {line.verdict for line in lines_of(CONTROLLED, one_round)} == {None}


def test_another_text_is_counted(records: list[Record]) -> None:
    changed = records[0].result.__class__(
        **(vars(records[0].result) | {"texts": ("answer 0", "something else")})
    )
    records[0] = Record(**(vars(records[0]) | {"result": changed}))
    assert lines_of(PLAN, records)[1].same_texts == 3


def test_answers_of_one_token_have_no_time_per_token(records: list[Record]) -> None:
    plain = records[1]
    result = plain.result.__class__(**(vars(plain.result) | {"tpot_ms": 0.0}))
    records[1] = Record(**(vars(plain) | {"result": result}))
    assert lines_of(PLAN, records)[1].tpot_ratio is None


def test_best_schedule_takes_what_is_fastest_and_covers_every_batch() -> None:
    gains = {
        1: (1.2, 1.5, 1.4),
        2: (1.2, 1.3, 1.1),
        4: (1.05, 1.01, 0.8),
        8: (0.9,) * 3,
    }
    ratios = {
        (side.name, batch): ratio
        for batch, row in gains.items()
        for side, ratio in zip(OURS, row, strict=True)
    }
    schedule = best_schedule(OURS, ratios)
    assert schedule == [(1, 2, 2), (3, 4, 1), (5, 8, 0)]
    side = calibrated_side("ours", "/drafters/ours", schedule)
    assert side.speculative_config is not None
    assert side.speculative_config["num_speculative_tokens"] == 2
    assert checked(side.speculative_config)  # as the server will


def test_a_drafter_that_never_pays_off_drafts_nothing() -> None:
    ratios = {(side.name, batch): 1.01 for side in OURS for batch in (1, 4)}
    schedule = best_schedule(OURS, ratios)
    assert schedule == [(1, 4, 0)]
    side = calibrated_side("ours", "/drafters/ours", schedule)
    assert side.speculative_config is not None
    assert checked(side.speculative_config)["num_speculative_tokens"] == 1


def test_report_says_everything_and_no_folders(
    controlled: list[Record], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    plan = replace(CONTROLLED, fresh_servers=True)
    stage = Stage(
        "Side by side", plan, lines_of(plan, controlled), {"none": 9, "ours": 9}
    )
    again = replace(stage, title="Calibrated")  # a control in the plot twice
    stages = [stage, again]
    report = Report("vllm-mtp bench", {"device": "a"}, stages, {"ours": [(1, 4, 2)]})
    files = write(report, tmp_path / "out")
    assert all(file.stat().st_size for file in files)
    text = markdown(report)
    for part in (
        "| Ratio | Verdict | TTFT ratio | TPOT ratio |",
        (
            "| 1 at once | ours k=2 | 11.8 | 1.60 (1.50 to 1.70) | faster | "
            "1.00 (0.90 to 1.10) | 0.63 (0.59 to 0.67) | 1.90 | 0.60 0.30 | 1.25 | "
            "4/4 | 0 |"
        ),
        "| 4 at once | ours k=2 | 11.8 | 1.60 (1.50 to 1.70) | within |",
        "| 1 at once | none again | 7.5 | 1.02 (0.95 to 1.10) | |",
        "2 rounds, each with servers of its own.",
        "[[1, 4, 2]]",
    ):
        assert part in text
    assert "9 blocks on every side" in text
    assert "share a server" not in text
    found = json.loads(files[0].read_text("utf-8"))
    ours = found["stages"][0]["lines"][1]
    assert ours["ratio"]["high"] == pytest.approx(1.7)
    assert ours["tpot_ratio"]["high"] == pytest.approx(1 / 1.5)
    assert ours["verdict"] == "faster"
    assert "/targets" not in files[0].read_text("utf-8")
    assert "/drafters" not in files[0].read_text("utf-8")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = Report("vllm-mtp bench", {}, [], {})
    with pytest.raises(MTPError, match="--out .*name another folder"):
        write(report, tmp_path / "file" / "out")


def test_too_few_prompts() -> None:
    with pytest.raises(MTPError, match="--prompts x: got 1 prompts, expected 3"):
        require_enough(["one"], 3, "x")


def test_a_draft_and_a_step_beside_one_without() -> None:
    """By hand: 2 + 1 of 10 ms under the profiler, and 12 over 8 ms without it."""
    profiles = [
        StepProfile("none", 1, 5, 10.0, 8.0, {"target: layers": 9.0}),
        StepProfile("none", 4, 5, 12.0, 9.0, {"target: layers": 9.0}),
        StepProfile(
            *("ours k=2", 1, 5, 16.0, 12.0),
            {"target: layers": 9.0, "draft: layers": 2.0, "draft: choice": 1.0},
            *("ours", 2),
        ),
        StepProfile("ours k=2", 8, 5, 16.0, 12.0, {"draft: layers": 2.0}, "ours", 2),
    ]
    assert step_rows("other", profiles) == []
    (row,) = step_rows("ours", profiles)
    assert (row.requests, row.tokens) == (1, 2)
    assert (row.draft, row.step) == pytest.approx((0.3, 1.5))
    shown = table(profiles)
    assert "| the draft, of a step of `none` | | | 0.30 | |" in shown
    assert "| the step, of one of `none` | | | 1.50 | |" in shown
    assert "the draft, of" not in table(profiles[:2])


def test_a_card_gets_one_side_and_the_loads_at_once(controlled: list[Record]) -> None:
    context = Load("512 tokens before", ("a",), 1, 8, CONTEXT)
    plan = replace(CONTROLLED, loads=(*LOADS, context), fresh_servers=True)
    more = [record(side, context, n, 5.0, 1.0) for side in plan.sides for n in (0, 1)]
    lines = lines_of(plan, controlled + more)
    machine = {"device": "CPU", "versions": "vllm 0.32.0", "environment": "A=1"}
    speed = speed_record(machine, plan, lines, "ours k=2")
    assert [row.requests for row in speed.rows] == [1, 4]
    assert speed.rows[0].ratio == pytest.approx(1.6)
    assert (speed.rows[0].low, speed.rows[0].high) == pytest.approx((1.5, 1.7))
    assert speed.rows[0].control == pytest.approx((0.95, 1.1))
    assert speed.rows[0].acceptance_length == pytest.approx(1.9)
    assert (speed.dtype, speed.compiled, speed.rounds) == ("float32", True, 2)
    assert speed.fresh_servers
    assert speed.schedule == []
    assert speed_record(machine, plan, lines, "nobody").rows == []
    calibrated = speed_record(
        machine, PLAN, lines_of(PLAN, controlled), "x", [(1, 4, 2)]
    )
    assert calibrated.schedule == [(1, 4, 2)]


def test_a_card_without_a_control_has_none(records: list[Record]) -> None:
    machine = {"device": "CPU", "versions": "vllm 0.32.0", "environment": "A=1"}
    speed = speed_record(machine, PLAN, lines_of(PLAN, records), "ours k=2")
    assert [row.control for row in speed.rows] == [None, None]
