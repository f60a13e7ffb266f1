# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown."""

import pytest

from vllm_mtp.markdown import aligned, plain, table


def test_a_table() -> None:
    assert table(("a", "b"), [("1", "`2`")]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| 1 | `2` |",
    ]


def test_an_empty_cell_is_one_space() -> None:
    assert table(("", ""), [("a", "")]).splitlines()[::2] == ["| | |", "| a | |"]


def test_numbers_stand_to_the_right_of_their_names() -> None:
    rule = table(("a", "b", "c"), (), numbers=True).splitlines()[1]
    assert rule == "| --- | ---: | ---: |"


def test_a_table_that_is_read_as_text() -> None:
    assert aligned(("name", "n"), [("x", "1,000")]).splitlines() == [
        "| name |     n |",
        "| ---- | ----: |",
        "| x    | 1,000 |",
    ]


@pytest.mark.parametrize(
    ("text", "cell"), [("a|b", r"a\|b"), ("a\n  b\tc", "a b c"), (" a ", "a")]
)
def test_text_cannot_end_its_cell(text: str, cell: str) -> None:
    assert plain(text) == cell
