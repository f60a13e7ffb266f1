# SPDX-License-Identifier: Apache-2.0
"""The pages' figures of the shipped drafters are those of the drafters' own files."""

import re
from pathlib import Path

import pytest

from vllm_mtp.drafter.checkpoint import read_config
from vllm_mtp.drafter.cost import draft_cost
from vllm_mtp.installed import installed_folder
from vllm_mtp.sharing.card import CARD_FILE
from vllm_mtp.sharing.folder import card_text, read_evaluation
from vllm_mtp.sharing.speed import read_speed

ROOT = Path(__file__).parents[2]
FOLDERS = {name: installed_folder(name) for name in ("cheap", "shared")}
each_drafter = pytest.mark.parametrize("name", FOLDERS)


def rows(page: str, title: str, name: str) -> list[list[str]]:
    """The cells of a drafter's rows in the tables of one section."""
    text = (ROOT / page).read_text("utf-8").partition(f"# {title}\n")[2]
    assert text, f"{page} has no section {title!r}"
    lines = re.split(r"^#+ ", text, maxsplit=1, flags=re.MULTILINE)[0].splitlines()
    mine = [line for line in lines if line.startswith(f"| `{name}` |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in mine]


@each_drafter
def test_the_page_has_the_weights_and_the_measured_times(name: str) -> None:
    (row,) = rows("docs/drafters.md", "The trained ones", name)
    cost = draft_cost(read_config(FOLDERS[name]))
    assert row[2] == f"{cost.relative_weights:.2f}"
    speed = read_speed(FOLDERS[name])
    one = [step for step in (speed.steps if speed else []) if step.requests == 1]
    times = (
        [f"{one[0].draft:.2f}", f"{one[0].step:.2f}"] if one else ["not measured"] * 2
    )
    assert row[3:5] == times


def test_the_page_has_the_measured_times() -> None:
    """To what the milliseconds of the page, rounded as they are, give."""
    page = (ROOT / "docs" / "benchmark.md").read_text("utf-8")
    table = {
        cells[0]: [float(cell.strip("* ")) for cell in cells[1:] if cell.strip("* %")]
        for line in page.splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])
        and re.fullmatch(r"(\| [^|]+){2,}\|", line)
        and cells[0].startswith(("draft: ", "**the step", "the step", "the draft"))
        and "%" not in line
    }
    speed = read_speed(FOLDERS["cheap"])
    assert speed is not None
    parts = [ms for part, ms in table.items() if part.startswith("draft: ")]
    drafts = [sum(ms) for ms in zip(*parts, strict=True)]
    steps, bare = table["**the step**"], table["the step without the profiler"]
    for number, step in enumerate(speed.steps):
        assert step.draft == pytest.approx(drafts[number] / steps[number], abs=0.005)
        assert step.step == pytest.approx(bare[number + 2] / bare[number], abs=0.005)
    told = [[step.draft for step in speed.steps], [step.step for step in speed.steps]]
    assert told == [
        table["the draft, of a step of `none`"],
        table["the step, of one of `none`"],
    ]


@each_drafter
def test_the_lengths_side_by_side_are_those_of_the_files(name: str) -> None:
    found = rows("docs/training.md", "Every acceptance length, side by side", name)
    evaluation, speed = read_evaluation(FOLDERS[name]), read_speed(FOLDERS[name])
    assert evaluation is not None
    total = evaluation.total
    of_file = {row[2].split(",")[0]: row[1] for row in found if "evaluation" in row[6]}
    assert of_file == {
        "AL": f"{total.simulated.acceptance_length:.2f}",
        "TFL": f"{total.teacher_forced_length:.2f}",
    }
    benched = [row[1] for row in found if "speed.json" in row[6]]
    lengths = [row.acceptance_length for row in (speed.rows if speed else [])]
    assert benched == [f"{length:.2f}" for length in lengths]


@each_drafter
def test_the_pages_lengths_are_among_them(name: str) -> None:
    (row,) = rows("docs/drafters.md", "The trained ones", name)
    found = rows("docs/training.md", "Every acceptance length, side by side", name)
    assert set(row[6:8]) <= {other[1] for other in found if "AL, in vLLM" in other[2]}


@each_drafter
def test_the_card_is_made_of_the_folders_files(name: str) -> None:
    assert (FOLDERS[name] / CARD_FILE).read_text("utf-8") == card_text(FOLDERS[name])


@each_drafter
def test_the_evaluation_has_todays_names(name: str) -> None:
    evaluation = read_evaluation(FOLDERS[name])
    assert evaluation is not None
    assert (FOLDERS[name] / "evaluation.json").read_text("utf-8") == (
        evaluation.to_json()
    )
