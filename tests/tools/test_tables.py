# SPDX-License-Identifier: Apache-2.0
"""The tables in the pages say what the package's data say."""

from pathlib import Path

import pytest

from tests.drafter.test_init import COPIED
from tests.tiny_targets import FAMILIES as TINY
from tools import recipes, tables
from vllm_mtp.families import FAMILIES, Own, Served
from vllm_mtp.serving.ledger import PATCHES
from vllm_mtp.serving.versions import TABLE


@pytest.mark.parametrize("part", tables.PARTS, ids=lambda part: part.name)
def test_the_page_is_up_to_date(part: tables.Part) -> None:
    page = part.page.read_text("utf-8")
    assert part.renewed(page) == page, "run python -m tools.tables"


def test_nothing_is_left_out() -> None:
    patches, releases = tables.patches(), tables.releases()
    assert all(f"`{patch.symbol}`" in patches for patch in PATCHES)
    for release in TABLE:
        assert f"| {release.version} |" in releases
        assert all(r.reason in releases for r in release.runners.values())


def test_every_family_stands_for_tiny_targets() -> None:
    """What is said to be exact is what `tests/serving/test_families.py` runs."""
    for family in FAMILIES:
        ran = family.v1 in (Served.EXACT, Served.TIES)
        assert set(family.tested) <= set(TINY), family.name
        assert bool(family.tested) or not ran, family.name
    named = {name for family in FAMILIES for name in family.tested}
    assert named == set(TINY)
    copied = {n for family in FAMILIES if family.own is Own.COPY for n in family.tested}
    assert copied == set(COPIED)


def test_every_recipe_has_a_family() -> None:
    assert sum(entry.count for entry in recipes.RECIPES) == 57
    found = recipes.counts()
    exact = found[Served.EXACT] + found[Served.TIES]
    assert (exact, found[Served.NOT_RUN], found[Served.REFUSED]) == (28, 8, 21)


def test_a_page_without_markers_is_named() -> None:
    part = tables.Part("x", Path("page.md"), lambda: "")
    with pytest.raises(SystemExit, match=r"page\.md: no markers <!-- generated: x"):
        part.renewed("text")
