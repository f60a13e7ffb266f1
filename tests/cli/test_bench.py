# SPDX-License-Identifier: Apache-2.0
"""`vllm-mtp bench`, as far as it goes without servers."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser

from vllm_mtp.bench import run
from vllm_mtp.bench.client import LoadResult
from vllm_mtp.bench.loads import CONCURRENCY
from vllm_mtp.bench.measure import Record
from vllm_mtp.bench.plan import (
    Load,
    Plan,
    auto_side,
    calibrated_side,
    control_side,
    plain_side,
)
from vllm_mtp.bench.report import Report, Stage
from vllm_mtp.bench.run import Drafters, machine
from vllm_mtp.bench.summary import lines_of
from vllm_mtp.cli.bench import Bench, _tell
from vllm_mtp.cli.main import main
from vllm_mtp.data.demo_target import ensure_demo_target
from vllm_mtp.data.split import is_held_out, prompt_id
from vllm_mtp.errors import MTPError
from vllm_mtp.installed import installed_folder
from vllm_mtp.metrics import AcceptanceCounts
from vllm_mtp.sharing.speed import read_speed

KS = ["--num-speculative-tokens"]
# name: (flags, what the message must hold)
WRONG = {
    "no such drafter": (["--drafters", "nobody"], ["--drafters nobody", "cheap"]),
    "calibrate another": (
        ["--drafters", "cheap", "--calibrate", "shared"],
        ["--calibrate shared", "expected one of cheap"],
    ),
    "calibrate nothing": (
        ["--drafters", "cheap", "--calibrate", "cheap", *KS, "8"],
        ["--calibrate cheap", "--num-speculative-tokens"],
    ),
    "a number that is none": (
        [*KS, "2", "x"],
        ["--num-speculative-tokens 2 x", "or none"],
    ),
    "no tokens": ([*KS, "0"], ["expected whole numbers from 1 on, or none"]),
    "none and some": (
        [*KS, "none", "2"],
        ["--num-speculative-tokens none 2", "or none"],
    ),
    "no such baseline": (["--baselines", "eagle"], ["got eagle", "ngram, draft_model"]),
    "no baseline and one": (["--baselines", "none", "ngram"], ["got none", "alone"]),
    "no such report": (["--show", "nowhere.json"], ["--show nowhere.json: cannot"]),
    "too few prompts": (
        ["--prompts", "PROMPTS", "--concurrency", "4"],
        ["got 1 prompts, expected 8"],
    ),
    "conversations as prompts": (
        ["--prompts", "sharegpt:later"],
        ["--prompts sharegpt:later: its prompts are conversations", "sharegpt:tasks"],
    ),
    "a misspelt source": (
        ["--prompts", "sharegpt:latter"],
        ["--prompts sharegpt:latter: no such file", "sharegpt:later", "self:N"],
    ),
    "prompts that nobody has written": (
        ["--prompts", "self:9"],
        ["--prompts self:9: only `vllm-mtp generate`"],
    ),
    "too few unseen prompts": (
        ["--prompts", "sharegpt", "--concurrency", "400"],
        ["sharegpt (not trained on: cheap): got ", "prompts, expected 800"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_refused_before_anything_starts(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Hello"}) + "\n")
    flags, expected = WRONG[name]
    flags = [str(prompts) if flag == "PROMPTS" else flag for flag in flags]
    assert main(["bench", "--target", str(tmp_path), *flags]) == 1
    message = capsys.readouterr().err
    for text in expected:
        assert text in message


def test_the_prompts_are_unseen_and_the_report_says_how(tmp_path: Path) -> None:
    bench = Bench(target=str(tmp_path), drafters=["cheap", "shared"], contexts=[512])
    tokenizer = Path(ensure_demo_target(), "tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(tokenizer.with_name(name), tmp_path)
    plan = bench._plan(bench._drafters())
    texts = {text for load in plan.loads_of(CONCURRENCY) for text in load.prompts}
    assert len(texts) == 16
    for text in texts:
        # Both were trained with this part held out.
        assert is_held_out(prompt_id([{"role": "user", "content": text}]), 0.04)
    told = machine(plan)["prompts"]
    assert "`cheap`: the 0.04 held out by hash" in told
    assert "`shared`: the 0.04 held out by hash" in told


def test_a_file_of_prompts_is_said_to_be_one(tmp_path: Path) -> None:
    bench = Bench(prompts=str(tmp_path / "mine.jsonl"))
    assert bench._choice_in_words([]).startswith("of mine.jsonl, whatever")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """V1 on a CPU, where the method chooses the number of tokens while it serves."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    return monkeypatch


def servers_of(*flags: str) -> tuple[list[str], list[str]]:
    """The names of the sides and of the servers."""
    (bench,) = HfArgumentParser(Bench).parse_args_into_dataclasses(list(flags))
    plan = Plan("/t", "float32", 64, 1, bench._sides("/t", bench._drafters()), ())
    return [side.name for side in plan.sides], list(plan.servers)


def test_the_length_left_to_the_method_takes_three_servers(
    on_cpu: pytest.MonkeyPatch,
) -> None:
    """As it is measured with new servers in each round."""
    flags = ("--baselines", "none", *KS, "none")
    three = ["none", "cheap auto", "none again"]
    assert servers_of(*flags) == (three, three)


def test_fixed_numbers_of_a_drafter_take_one_server_more(
    on_cpu: pytest.MonkeyPatch,
) -> None:
    sides = ["none", "ngram k=4", "cheap k=2", "cheap k=4", "cheap auto", "none again"]
    servers = ["none", "ngram k=4", "cheap, any k", "cheap auto", "none again"]
    assert servers_of() == (sides, servers)
    assert servers_of(*KS, "2", "4", "2", "9") == (
        [side.replace("ngram k=4", "ngram k=9") for side in sides],
        [server.replace("ngram k=4", "ngram k=9") for server in servers],
    ), "cheap was made for four"
    assert servers_of(*KS, "none")[1] == [*servers[:2], *servers[3:]]
    on_cpu.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert servers_of() == (sides, sides)


def test_a_drafter_is_calibrated_only_where_the_method_cannot_choose(
    on_cpu: pytest.MonkeyPatch,
) -> None:
    assert Bench()._drafters().calibrate is None
    assert Bench(calibrate="cheap")._drafters().calibrate == "cheap"
    on_cpu.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    two = ["shared", "cheap"]
    assert Bench(drafters=two)._drafters().calibrate == "shared"
    assert Bench(drafters=two, calibrate="cheap")._drafters().calibrate == "cheap"
    nothing = Bench(drafters=two, num_speculative_tokens=["none"])
    assert nothing._drafters().calibrate is None


# A measurement of two loads and `cheap auto`; no server runs.
SIDES = (plain_side(), auto_side("cheap", "/d/cheap"), control_side())
LOADS = (Load("1 at once", ("a",), 1, 8), Load("4 at once", ("a",), 4, 8))
PLAN = Plan("/t", "float32", 64, 2, SIDES, LOADS)
MACHINE = {"device": "CPU, 2 cores", "versions": "vllm 0.32.0", "environment": "A=1"}


def measured(*schedules: tuple[int, int, int]) -> Report:
    """`cheap` is at 1.5 with the number left to it, at 1.2 if it is calibrated."""
    side = calibrated_side("cheap", "/d/cheap", schedules) if schedules else SIDES[1]
    plan = replace(PLAN, sides=(SIDES[0], side, SIDES[2]))
    speeds = {"none": 10.0, "none again": 10.5, "cheap auto": 15.0}
    counts = AcceptanceCounts(5, 10, (4, 1))
    records = [
        Record(side.name, load.name, number, result, counts, 0, 0)
        for load in LOADS
        for side in plan.sides
        for number in range(plan.rounds)
        for result in [LoadResult(speeds.get(side.name, 12.0), 9, 1, 1, 1, ("x",))]
    ]
    stage = Stage("Calibrated", plan, lines_of(plan, records), {"none": 9})
    return Report(
        "bench", MACHINE, [stage], {"cheap": [*schedules]} if schedules else {}
    )


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    """A copy of `cheap`, for its card to be written."""
    folder = tmp_path / "cheap"
    shutil.copytree(installed_folder("cheap"), folder)
    return folder


@pytest.mark.parametrize(
    ("schedule", "ratio", "tells"),
    [
        ([], 1.5, "`num_speculative_tokens` was left out"),
        ([(1, 4, 2)], 1.2, "`[[1, 4, 2]]`"),
    ],
)
def test_a_card_tells_how_a_user_serves_the_drafter(
    schedule: list[tuple[int, int, int]], ratio: float, tells: str, drafter: Path
) -> None:
    _tell(measured(*schedule), Drafters({"cheap": str(drafter)}))
    speed = read_speed(drafter)
    assert speed is not None
    assert [row.ratio for row in speed.rows] == pytest.approx([ratio] * 2)
    assert speed.rows[0].control == pytest.approx((1.05, 1.05))
    assert speed.schedule == schedule
    assert tells in (drafter / "README.md").read_text("utf-8")


def test_a_card_is_of_its_own_drafter_where_another_is_calibrated(
    drafter: Path,
) -> None:
    stages = [*measured().stages, *measured((1, 4, 2)).stages]
    report = Report("bench", MACHINE, stages, {"another": [(1, 4, 2)]})
    _tell(report, Drafters({"cheap": str(drafter)}))
    speed = read_speed(drafter)
    assert speed is not None
    assert [row.ratio for row in speed.rows] == pytest.approx([1.5] * 2)


def test_what_was_measured_is_written_before_something_fails(
    drafter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def reports(*_: object) -> Iterator[Report]:
        yield measured()
        raise MTPError("the profile failed")

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(run, "reports", reports)
    monkeypatch.setattr(Bench, "_plan", lambda *_: PLAN)
    out = tmp_path / "out"
    flags = ["--drafters", str(drafter), "--out", str(out), *KS, "none"]
    assert main(["bench", *flags, "--into-card"]) == 1
    said = capsys.readouterr()
    assert f"written: {out / 'benchmark.json'}" in said.out
    assert "the profile failed" in said.err
    found = json.loads((out / "benchmark.json").read_text("utf-8"))
    verdicts = {line["side"]: line["verdict"] for line in found["stages"][0]["lines"]}
    assert verdicts == {"none": None, "cheap auto": "faster", "none again": None}


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    drafter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reports(*_: object) -> Iterator[Report]:
        raise AssertionError("the work began")
        yield

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(run, "reports", reports)
    monkeypatch.setattr(Bench, "_plan", lambda *_: PLAN)
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    assert main(["bench", "--drafters", str(drafter), "--out", out]) == 1
