# SPDX-License-Identifier: Apache-2.0
"""Drafts from a request's own text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mtp.serving.lookup import LEAST, MOST, Lookup, Lookups, Match


def of(*tokens: int) -> Lookup:
    lookup = Lookup()
    lookup.extend(tokens)
    return lookup


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((), None),
        ((1,), None),
        ((1, 2, 3), None),
        ((1, 1), None),
        ((1, 2, 3, 4, 5, 1, 2), Match(2, [3, 4, 5])),
        # The newest of two.
        ((1, 2, 3, 9, 1, 2, 4, 9, 8, 1, 2), Match(2, [4, 9, 8])),
        # A longer one is better than a newer one.
        ((7, 1, 2, 3, 9, 8, 1, 2, 4, 9, 7, 1, 2), Match(3, [3, 9, 8])),
        # A period shorter than what is wanted goes on.
        ((1, 1, 1), Match(2, [1, 1, 1])),
        ((5, 6, 5, 6), Match(2, [5, 6, 5])),
    ],
)
def test_what_followed(tokens: tuple[int, ...], expected: Match | None) -> None:
    assert of(*tokens).match(3) == expected


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 6))
def test_as_looked_for_by_hand(tokens: list[int], wanted: int) -> None:
    lookup = Lookup()
    for first in range(0, len(tokens), 5):  # in pieces, as it comes
        lookup.extend(tokens[first : first + 5])
    assert len(lookup) == len(tokens)
    found = lookup.match(wanted)
    lengths = []  # of the matches that end at each index before the last
    for end in range(len(tokens) - 1):
        length = 0
        while length < MOST and length <= end:
            if tokens[end - length] != tokens[-1 - length]:
                break
            length += 1
        lengths.append(length)
    best = max(lengths, default=0)
    if best < LEAST:
        assert found is None
        return
    assert found is not None
    # With many equal pairs only the newest places are tried.
    assert LEAST <= found.length <= best
    if sum(length >= LEAST for length in lengths) <= 16:
        assert found.length == best
    assert len(found.tokens) == wanted
    behind = [i + 1 for i, length in enumerate(lengths) if length >= found.length]
    assert any(found.tokens[0] == tokens[index] for index in behind)


def test_requests_come_grow_and_go() -> None:
    lookups = Lookups()
    text = ([1, 2, 3], [4, 1])
    assert lookups.matches({"a": text, "b": ([5], [])}, 2) == {}
    found = lookups.matches({"a": ([1, 2, 3], [4, 1, 2])}, 2)
    assert found == {"a": Match(2, [3, 4])}
    # Only what is new was added, and the other was forgotten.
    assert {name: len(index) for name, (index, _) in lookups._of_request.items()} == {
        "a": 6
    }
    # A streaming session: what was answered is part of the prompt now.
    found = lookups.matches({"a": ([1, 2, 3, 4, 1, 2, 9], [3, 9])}, 2)
    assert found == {}
    found = lookups.matches({"a": ([1, 2, 3, 4, 1, 2, 9], [3, 9, 3])}, 2)
    assert found == {"a": Match(2, [9, 3])}
    # Another request of the same name, with a prompt as long.
    assert lookups.matches({"a": ([7] * 7, [])}, 1) == {"a": Match(MOST - 2, [7])}
