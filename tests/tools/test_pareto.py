# SPDX-License-Identifier: Apache-2.0
"""Which drafters are worth their cost."""

from pathlib import Path

from tools.pareto import Candidate, candidates, frontier, plot


def test_the_frontier_holds_what_nothing_beats() -> None:
    cheap, dear, beaten, equal = (
        Candidate("cheap", 0.2, 1.5, False),
        Candidate("dear", 1.0, 2.0, False),
        Candidate("beaten", 0.5, 1.4, False),
        Candidate("equal", 0.2, 1.3, False),
    )
    assert frontier([dear, beaten, equal, cheap]) == [cheap, dear]
    assert cheap.at_best == 1.25


def test_every_row_of_the_ablation_and_both_shipped_are_there(tmp_path: Path) -> None:
    found = candidates()
    assert {one.name for one in found if one.shipped} == {"cheap", "shared"}
    assert len(found) > 20
    assert all(one.length > 1 and 0 < one.weights < 2 for one in found)
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
