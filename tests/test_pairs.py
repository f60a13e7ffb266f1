# SPDX-License-Identifier: Apache-2.0
"""Every pair of values that is allowed occurs."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pairs import all_pairs, pairs_of

AXES = ("abcdef", "tuv", "xyz", "12")
WHOLE = list(product(*AXES))
ALLOWED = [case for case in WHOLE if not {"a", "2"} <= set(case)]


@pytest.mark.parametrize("cases", [WHOLE, ALLOWED, WHOLE[:1], []])
def test_every_allowed_pair_occurs(cases: list[tuple[str, ...]]) -> None:
    chosen = all_pairs(cases)
    assert set(chosen) <= set(cases)
    assert len(set(chosen)) == len(chosen)
    assert _pairs(chosen) == _pairs(cases)


@given(st.sets(st.tuples(*(st.sampled_from(axis) for axis in AXES)), max_size=30))
def test_whatever_is_allowed(cases: set[tuple[str, ...]]) -> None:
    assert _pairs(all_pairs(sorted(cases))) == _pairs(cases)


def test_it_is_a_small_part_and_always_the_same() -> None:
    chosen = all_pairs(WHOLE)
    # No part can have fewer than the two longest axes' product.
    assert 18 <= len(chosen) <= 24 < len(WHOLE)
    assert all_pairs(WHOLE) == chosen


def test_what_costs_more_is_started_less() -> None:
    def num_started(cost: float) -> int:
        cases = all_pairs(WHOLE, shared=lambda case: case[1:], start=lambda _: cost)
        assert _pairs(cases) == _pairs(WHOLE)
        return len({case[1:] for case in cases})

    assert num_started(20) == 9 < num_started(0)  # the longest two axes' product


def _pairs(cases: list[tuple[str, ...]] | set[tuple[str, ...]]) -> set[object]:
    return {pair for case in cases for pair in pairs_of(case)}
