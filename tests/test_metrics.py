# SPDX-License-Identifier: Apache-2.0
"""Acceptance: the definitions, and where the counts come from."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_mtp.metrics import AcceptanceCounts, count_accepted, read_vllm_counters

NOTHING = AcceptanceCounts(0, 0, ())


def test_definitions() -> None:
    # 10 drafts of 4 tokens: 6 had the first token accepted, 4 the second, ...
    counts = AcceptanceCounts(10, 40, (6, 4, 1, 0))
    assert counts.accepted_tokens == 11
    assert counts.acceptance_length == pytest.approx(1 + 11 / 10)
    assert counts.acceptance_rate == pytest.approx(11 / 40)
    assert counts.acceptance_per_position == pytest.approx((0.6, 0.4, 0.1, 0.0))


def test_nothing_drafted_is_one_token_per_step() -> None:
    assert NOTHING.acceptance_length == 1.0
    assert NOTHING.acceptance_rate == 0.0
    assert NOTHING.acceptance_per_position == ()
    assert AcceptanceCounts(0, 0, (0, 0)).acceptance_per_position == (0.0, 0.0)


@st.composite
def counts(draw: st.DrawFn) -> AcceptanceCounts:
    positions = draw(st.lists(st.integers(0, 50), max_size=5))
    return AcceptanceCounts(
        draw(st.integers(0, 50)), draw(st.integers(0, 250)), tuple(positions)
    )


@given(counts(), counts())
def test_sums_add_every_counter(a: AcceptanceCounts, b: AcceptanceCounts) -> None:
    total = a + b
    assert total.drafts == a.drafts + b.drafts
    assert total.draft_tokens == a.draft_tokens + b.draft_tokens
    assert total.accepted_tokens == a.accepted_tokens + b.accepted_tokens
    assert total == b + a


@given(counts(), counts())
def test_subtracting_undoes_adding(a: AcceptanceCounts, b: AcceptanceCounts) -> None:
    positions = max(len(a.accepted_per_position), len(b.accepted_per_position))
    same_width = a + AcceptanceCounts(0, 0, (0,) * positions)
    assert (a + b) - b == same_width


def test_positions_are_added_position_by_position() -> None:
    long, short = AcceptanceCounts(3, 9, (3, 2, 1)), AcceptanceCounts(2, 2, (2,))
    assert long + short == AcceptanceCounts(5, 11, (5, 2, 1))
    assert long - short == AcceptanceCounts(1, 7, (1, 2, 1))


@st.composite
def drafts_and_truth(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    """Few different tokens, so that matches are common; -1 was not reached."""
    positions = draw(st.integers(1, 5))
    num_drafts = draw(st.integers(1, 6))

    def table(least: int) -> list[list[int]]:
        row = st.lists(st.integers(least, 2), min_size=positions, max_size=positions)
        return draw(st.lists(row, min_size=num_drafts, max_size=num_drafts))

    return table(0), table(-1)


@given(drafts_and_truth())
def test_count_accepted_stops_at_the_first_wrong_token(
    tables: tuple[list[list[int]], list[list[int]]],
) -> None:
    drafted, truth = tables
    accepted = [0] * len(drafted[0])
    for tokens, right in zip(drafted, truth, strict=True):
        for position, (token, wanted) in enumerate(zip(tokens, right, strict=True)):
            if token != wanted:
                break
            accepted[position] += 1
    found = count_accepted(torch.tensor(drafted), torch.tensor(truth))
    assert found == AcceptanceCounts(
        len(drafted), len(drafted) * len(drafted[0]), tuple(accepted)
    )


def _metric(name: str, value: int | list[int], engine: str = "0") -> SimpleNamespace:
    field = "values" if isinstance(value, list) else "value"
    labels = {"model_name": "m", "engine": engine}
    return SimpleNamespace(name=f"vllm:{name}", labels=labels, **{field: value})


def test_vllm_counters_are_found_among_others() -> None:
    metrics = [
        _metric("num_requests_running", 99),
        _metric("spec_decode_num_drafts", 10),
        _metric("spec_decode_num_draft_tokens", 40),
        _metric("spec_decode_num_accepted_tokens", 11),
        _metric("spec_decode_num_accepted_tokens_per_pos", [6, 4, 1, 0]),
        SimpleNamespace(name="vllm:e2e_request_latency_seconds", count=1, sum=2.0),
    ]
    assert read_vllm_counters(metrics) == AcceptanceCounts(10, 40, (6, 4, 1, 0))


def test_vllm_without_speculation_has_no_counters() -> None:
    assert read_vllm_counters([_metric("num_requests_running", 99)]) == NOTHING


# With data parallelism each engine has its own set, told apart by a label.
TWO_ENGINES = [
    _metric("spec_decode_num_drafts", 10, "0"),
    _metric("spec_decode_num_drafts", 5, "1"),
    _metric("spec_decode_num_draft_tokens", 20, "0"),
    _metric("spec_decode_num_draft_tokens", 10, "1"),
    _metric("spec_decode_num_accepted_tokens_per_pos", [6, 4], "0"),
    _metric("spec_decode_num_accepted_tokens_per_pos", [3, 1], "1"),
]


def test_drafts_of_several_engines_are_added() -> None:
    counts = read_vllm_counters(TWO_ENGINES)
    assert (counts.drafts, counts.draft_tokens) == (15, 30)


def test_accepted_tokens_of_several_engines_are_added() -> None:
    assert read_vllm_counters(TWO_ENGINES).accepted_per_position == (9, 5)
