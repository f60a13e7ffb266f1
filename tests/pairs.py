# SPDX-License-Identifier: Apache-2.0
"""Few cases of many, in which every two values still meet."""

from collections.abc import Callable, Hashable, Sequence
from itertools import combinations
from typing import Any, TypeVar

Case = TypeVar("Case", bound=tuple[str, ...])
Pair = tuple[tuple[int, str], tuple[int, str]]


def pairs_of(case: tuple[str, ...]) -> set[Pair]:
    """Every two values of a case, each with the number of its axis."""
    return set(combinations(enumerate(case), 2))


def all_pairs(
    cases: Sequence[Case],
    shared: Callable[[Any], Hashable] = lambda case: case,
    start: Callable[[Any], float] = lambda _: 0.0,
) -> list[Case]:
    """A part of the cases that has every pair of values which all of them have.

    Greedy: next comes the case with the most new pairs for its cost, the first of
    several. So the same cases always give the same part, and it is small, but not
    the smallest there is.

    Args:
        cases: All that are allowed; each is one value per axis.
        shared: What a case needs and others can use as well.
        start: What that costs when the first needs it; a case itself costs 1.
    """
    numbers: dict[Pair, int] = {}
    masks = {
        case: sum(1 << numbers.setdefault(p, len(numbers)) for p in pairs_of(case))
        for case in cases
    }
    missing = (1 << len(numbers)) - 1
    started: set[Hashable] = set()

    def value(case: Case) -> float:
        cost = 1 + (0 if shared(case) in started else start(case))
        return (masks[case] & missing).bit_count() / cost

    chosen: list[Case] = []
    while missing:
        best = max(masks, key=value)
        chosen.append(best)
        started.add(shared(best))
        missing &= ~masks.pop(best)
    return chosen
