# SPDX-License-Identifier: Apache-2.0
"""The report on an offline evaluation."""

import json
from pathlib import Path

import pytest

from vllm_mtp.errors import MTPError
from vllm_mtp.evaluation.offline import CategoryResult, OfflineResult
from vllm_mtp.evaluation.report import markdown, plot, write_report
from vllm_mtp.metrics import AcceptanceCounts

CHAT = CategoryResult(
    2,
    1500,
    AcceptanceCounts(1000, 2000, (800, 400)),
    (AcceptanceCounts(500, 500, (450,)), AcceptanceCounts(400, 800, (300, 100))),
)
CODE = CategoryResult(
    1,
    90,
    AcceptanceCounts(80, 160, (8, 0)),
    (AcceptanceCounts(60, 60, (6,)), AcceptanceCounts(100, 200, (50, 25))),
)
RESULT = OfflineResult(2, {"chat": CHAT, "code": CODE}, {"data": "somewhere"})


def many(count: int) -> OfflineResult:
    return OfflineResult(2, {f"kind {i}": CHAT for i in range(count)})


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table: simulated, teacher-forced."""
    found = [part for part in text.split("\n\n") if part.startswith("|")]
    return [
        [[cell.strip() for cell in line.split(" | ")] for line in part.splitlines()]
        for part in found
    ]


def test_table_has_every_number() -> None:
    simulated, teacher_forced = tables(markdown(RESULT))
    assert simulated[0][0] == "| category"
    assert simulated[0][1:] == [
        "sequences", "tokens", "drafts", "position 1", "position 2", "AL k=1",
        "AL k=2 |",
    ]  # fmt: skip
    assert simulated[2:] == [
        ["| chat", "2", "1,500", "400", "0.750", "0.250", "1.900", "2.000 |"],
        ["| code", "1", "90", "100", "0.500", "0.250", "1.100", "1.750 |"],
        ["| **all**", "3", "1,590", "500", "0.700", "0.250", "1.814", "1.950 |"],
    ]
    assert teacher_forced[0][5:] == ["position 2", "TFL k=1", "TFL k=2 |"]
    assert teacher_forced[2] == (
        ["| chat", "2", "1,500", "1,000", "0.800", "0.400", "1.800", "2.200 |"]
    )


def test_rows_are_aligned_and_names_cannot_break_them() -> None:
    odd = OfflineResult(2, {"a|b\n| c": CHAT, "long name of a category": CODE})
    for part in markdown(odd).split("\n\n"):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({len(line) for line in lines}) <= 1
        columns = {line.replace(r"\|", "").count("|") for line in lines}
        assert columns <= {9}
    assert r"a\|b \| c" in markdown(odd)


def test_json_says_what_its_numbers_are() -> None:
    text = RESULT.to_json()
    derived = json.loads(text)["total"]["derived"]
    assert "acceptance_length_by_k" in derived["simulated"]
    assert "teacher_forced_length_by_k" in derived["teacher_forced"]
    assert "acceptance_length_by_k" not in derived["teacher_forced"]
    assert '"data": "somewhere"' in text
    assert "bonus token" in text
    assert "denominator" in text
    assert OfflineResult.from_json(text).total == CHAT + CODE


def test_files(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    for result in (many(1), RESULT):  # the second replaces the first
        files = write_report(result, out)
    assert sorted(out.iterdir()) == sorted(files)
    names = {file.name for file in files}
    assert names == {"evaluation.json", "evaluation.md", "acceptance.png"}
    assert OfflineResult.from_json((out / "evaluation.json").read_text()) == RESULT
    assert (out / "evaluation.md").read_text() == markdown(RESULT) + "\n"
    assert (out / "acceptance.png").read_bytes().startswith(b"\x89PNG")


def lines_of(monkeypatch: pytest.MonkeyPatch, result: OfflineResult) -> dict:
    """What `plot` draws: label to its y values."""
    from matplotlib.figure import Figure

    drawn = {}

    def keep(figure: Figure, *_: object, **__: object) -> None:
        for line in figure.axes[0].lines:
            drawn[line.get_label()] = list(line.get_ydata())

    monkeypatch.setattr(Figure, "savefig", keep)
    plot(result, Path("none.png"))
    return drawn


def test_plot_has_a_line_per_category_and_one_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert lines_of(monkeypatch, RESULT) == {
        " chat": [0.75, 0.25],
        " code": [0.5, 0.25],
        " all": [0.7, 0.25],
    }


def test_plot_of_many_categories_keeps_the_largest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = OfflineResult(2, {"small": CODE} | many(9).by_category)
    assert set(lines_of(monkeypatch, result)) == (
        {f" kind {i}" for i in range(9)} | {" all"}
    )


@pytest.mark.parametrize("name", ["_hidden", "$x_", "a$", "", "ü"])
def test_plot_takes_any_name(name: str, tmp_path: Path) -> None:
    plot(OfflineResult(2, {name: CHAT}), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_missing_matplotlib_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_mtp.evaluation.report.find_spec", lambda _: None)
    with pytest.raises(MTPError, match=r"pip install 'vllm-mtp\[bench\]'"):
        write_report(RESULT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(MTPError, match="cannot be written"):
        write_report(RESULT, tmp_path / "out")
