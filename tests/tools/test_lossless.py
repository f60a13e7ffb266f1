# SPDX-License-Identifier: Apache-2.0
"""The page of rows that were compared, from what was kept of them."""

import json
from types import SimpleNamespace

import pytest

from tools.lossless import DATA, FEW, FEW_NOTE, HEAD, PAGE, line_of, renewed
from vllm_mtp.metrics import AcceptanceCounts

DRAFTS = HEAD.index("Drafts")
LEAST = 20


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text("utf-8")
    assert renewed(page, json.loads(DATA.read_text("utf-8"))) == page


def test_every_row_with_few_drafts_is_marked() -> None:
    lines = [line for table in json.loads(DATA.read_text()).values() for line in table]
    ran = [line for line in lines if line[DRAFTS] != "-"]
    few = [line for line in ran if int(line[DRAFTS].removesuffix(FEW)) < LEAST]
    assert len(few) < len(ran) / 5
    assert {line[0] for line in few} == {
        line[0] for line in ran if line[DRAFTS].endswith(FEW)
    }


@pytest.mark.parametrize("drafts", [3, LEAST - 1, LEAST])
def test_the_mark_goes_with_the_row(drafts: int) -> None:
    matrix = pytest.importorskip("tests.serving.lossless.matrix")
    assert matrix.LEAST_DRAFTS == LEAST
    assert f"Fewer than {LEAST} drafts" in FEW_NOTE
    counts = AcceptanceCounts(drafts, 4 * drafts, (drafts, 0, 0, 0))
    side = matrix.Side([], matrix.Facts(counts, *[0] * 7), 0, ())
    row, subject = SimpleNamespace(name="choice", shows=()), SimpleNamespace()
    line = line_of(matrix.Result(subject, row, side, side, []))
    assert line[DRAFTS] == (f"{drafts}{FEW}" if drafts < LEAST else str(drafts))
    marks = "<!-- generated: lossless -->\n<!-- end: lossless -->"
    page = renewed(marks, {"tiny": [line]})
    assert ("† Fewer than" in page) == (drafts < LEAST)
