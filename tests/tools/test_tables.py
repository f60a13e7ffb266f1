# SPDX-License-Identifier: Apache-2.0
"""The tables in the pages say what the package's data say."""

from pathlib import Path

import pytest

from tools import tables
from vllm_mtp.serving.ledger import PATCHES
from vllm_mtp.serving.versions import TABLE


@pytest.mark.parametrize("part", tables.PARTS, ids=lambda part: part.name)
def test_the_page_is_up_to_date(part: tables.Part) -> None:
    page = part.page.read_text("utf-8")
    assert part.renewed(page) == page, "run python tools/tables.py"


def test_nothing_is_left_out() -> None:
    patches, releases = tables.patches(), tables.releases()
    assert all(f"`{patch.symbol}`" in patches for patch in PATCHES)
    for release in TABLE:
        assert f"| {release.version} |" in releases
        assert all(r.reason in releases for r in release.runners.values())


def test_a_page_without_markers_is_named() -> None:
    part = tables.Part("x", Path("page.md"), lambda: "")
    with pytest.raises(SystemExit, match=r"page\.md: no markers <!-- generated: x"):
        part.renewed("text")
