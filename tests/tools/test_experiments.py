# SPDX-License-Identifier: Apache-2.0
"""Changes to a training, one at a time: the rows, the way through, and the page."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny_answers import write_answers
from tests.tiny_tokenizer import save_tiny_tokenizer
from tools import experiments
from tools.experiments import BASE, FIRST, ROOT, START, main, renewed, rows
from tools.systems.reference import SETS
from tools.systems.train import flags_of
from vllm_mtp.cli.main import _load
from vllm_mtp.drafter.checkpoint import read_config, save_drafter
from vllm_mtp.installed import installed_folder
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter

OF_A_RUN = {"warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs"}


@pytest.mark.parametrize(
    "name", [n for n, row in rows().items() if row.set is not None]
)
def test_rows_are_settings_that_train_takes(name: str) -> None:
    row = rows()[name]
    assert row.set is not None
    given = {"target": "t", "data": list(row.data), "use_cpu": True, **row.set}
    args = _load("train", [str(BASE), *flags_of(given)])
    for key, value in row.set.items():
        assert getattr(args, key) == value
    args.plan()
    args.get_warmup_steps(args.max_steps)


def test_all_go_on_as_the_last_run_of_the_shipped_drafter() -> None:
    last = yaml.safe_load((ROOT / "examples" / "train" / "cheap.yaml").read_text())
    base = yaml.safe_load(BASE.read_text())
    of_new_drafters = {"bridge_texts", "num_train_epochs"}
    wanted = {k: v for k, v in last.items() if k not in OF_A_RUN | of_new_drafters}
    assert wanted.items() <= base.items()
    assert (
        read_config(installed_folder(START)).num_speculative_tokens
        == (base["num_speculative_tokens"])
    )


def test_a_row_differs_from_the_first_one() -> None:
    first, *others = rows().values()
    assert first.set == {}
    assert first.data == (FIRST,)
    assert all(row.set != {} or row.data != first.data for row in others)


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that can chat, its drafter, answers, and two rows."""
    folder = tmp_path_factory.mktemp("experiments")
    target = shutil.copytree(tiny_llama, folder / "target")
    save_tiny_tokenizer(target)
    (target / "chat_template.jinja").write_text("{{ messages[0].content }}")
    made = new_drafter(target, "own:3", 3, DrafterOptions(dtype="float32"))
    save_drafter(made, folder / "drafter")
    texts = [[n, *range(40 + n, 60 + n)] for n in range(12)]
    write_answers(folder / "answers", target, texts, [4] * 12)
    (folder / "prompts.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "de"}\n')
    settings = {
        "layers": "own:3",
        "num_speculative_tokens": 3,
        "max_steps": 2,
        "anchors_per_text": 2,
        "per_device_train_batch_size": 2,
        "report_to": [],
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(settings))
    (folder / "rows.yaml").write_text(
        "- {name: base, asks: nothing, set: {}}\n"
        "- {name: before, asks: as it was, set: null}\n"
        "- {name: fast, asks: a rate, set: {learning_rate: 0.5}}\n"
        "- {name: kinds, asks: more, data: [first, later], set: {}}\n"
    )
    return folder


@pytest.fixture
def way(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[list[str]]:
    """Flags of a way through with files of its own."""
    page = tmp_path / "page.md"
    page.write_text("<!-- generated: experiments -->\n<!-- end: experiments -->\n")
    monkeypatch.setattr(experiments, "FOLDER", folder)
    monkeypatch.setattr(experiments, "BASE", folder / "base.yaml")
    monkeypatch.setattr(experiments, "PAGE", page)
    monkeypatch.setattr(experiments, "DATA", tmp_path / "experiments.json")
    monkeypatch.setattr(experiments, "installed_folder", lambda _: folder / "drafter")
    monkeypatch.setattr(
        "tools.systems.reference.UNSEEN_PROMPTS", folder / "prompts.jsonl"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows.cache_clear()
    yield [
        *("--target", str(folder / "target"), "--out", str(folder / "runs")),
        *("--data", f"first={folder / 'answers'}", "--max-tokens", "8"),
    ]
    rows.cache_clear()


def test_rows_are_trained_compared_and_shown(
    way: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # A row without its data is said, and the others are trained.
    assert main(["train", *way]) == 1
    said = capfd.readouterr().err
    assert "kinds: --data has no later=FOLDER" in said
    assert "not trained: kinds;" in said
    assert main(["evaluate", *way]) == 0
    assert main(["report", "--out", str(folder / "runs")]) == 0
    results = json.loads(experiments.DATA.read_text())
    assert list(results) == ["base", "before", "fast"]
    assert results["before"]["cpu_hours"] == 0
    text = experiments.PAGE.read_text()
    base, fast, kinds = (
        next(x for x in text.splitlines() if x.startswith(f"| {name} |"))
        for name in ("base", "fast", "kinds")
    )
    assert fast.startswith("| fast | a rate | `learning_rate=0.5` | ")
    assert fast.count(" to ") == len(SETS)
    assert " to " not in base
    assert not any(char.isdigit() for char in kinds)
    # What is there is neither trained nor decoded again.
    assert main(["train", *way, "--only", "base"]) == 0
    assert "base: is trained" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["train", "--only", "x"], "--only x: expected some of base, "),
        (["train"], "--target: got nothing"),
        (
            ["train", "--target", "t", "--out", "o", "--data", "d"],
            "--data: got 'd', expected NAME=FOLDER",
        ),
        (
            ["evaluate", "--target", "t", "--out", "o", "--data", "later=d"],
            "--data: got no first=FOLDER",
        ),
        (["report", "--out", "nowhere"], "--out nowhere: no trained run of these"),
    ],
)
def test_bad_input_is_one_line(
    flags: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 1
    said = capsys.readouterr().err
    assert error in said
    assert said.count("\n") == 1


def made_up(*accepted: int) -> dict[str, Any]:
    counts = [[count, 10] for count in accepted]
    return {
        "cpu_hours": 0.5,
        "cpu": "x",
        "accepted_and_drafts": dict.fromkeys(SETS, counts),
    }


def test_a_difference_is_of_the_same_prompts() -> None:
    page = "<!-- generated: experiments -->\n<!-- end: experiments -->\n"
    text = renewed(page, {"base": made_up(10, 30), "average": made_up(12, 32)})
    (line,) = (x for x in text.splitlines() if x.startswith("| average |"))
    both = "3.200 | +0.200 (+0.200 to +0.200)"
    assert line.endswith(f"| `ema_decay=0.99` | {both} | {both} | 0.50 |")


def test_the_page_is_what_its_numbers_give() -> None:
    results = json.loads(experiments.DATA.read_text("utf-8"))
    text = experiments.PAGE.read_text("utf-8")
    assert renewed(text, results) == text, "python -m tools.experiments report"
