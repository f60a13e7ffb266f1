# SPDX-License-Identifier: Apache-2.0
"""Differences of two drafters on the same prompts."""

import math

import numpy as np
import pytest

from vllm_mtp.errors import MTPError
from vllm_mtp.evaluation.paired import paired_difference
from vllm_mtp.metrics import AcceptanceCounts


def counts(accepted: int, drafts: int) -> AcceptanceCounts:
    """Of drafts of one token."""
    return AcceptanceCounts(drafts, drafts, (accepted,))


def test_the_interval_is_that_of_the_mean_where_all_prompts_weigh_the_same() -> None:
    """With equal drafts per prompt the difference is a mean over prompts, of which the
    interval is known: the mean, give or take 1.96 standard errors."""
    draws = np.random.default_rng(7)
    gains = draws.integers(0, 21, size=400)
    one = [counts(40 + int(gain), 100) for gain in gains]
    other = [counts(45, 100)] * 400
    found = paired_difference(one, other)
    each = gains / 100 - 0.05
    error = each.std() / math.sqrt(len(each))
    assert found.estimate == pytest.approx(each.mean())
    assert found.low == pytest.approx(each.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(each.mean() + 1.96 * error, abs=0.1 * error)
    assert found.is_sure
    assert found.prompts == 400


def test_prompts_are_drawn_in_pairs() -> None:
    """Prompts that differ much, and drafters that always differ by the same: pairs know
    the difference exactly, which two separate draws would not."""
    easy = [counts(10 * i % 90, 100) for i in range(50)]
    harder = [counts(10 * i % 90 + 5, 100) for i in range(50)]
    found = paired_difference(harder, easy)
    assert found.low == pytest.approx(0.05)
    assert found.high == pytest.approx(0.05)


def test_lengths_are_ratios_of_sums() -> None:
    one = [counts(0, 10), counts(90, 90)]
    other = [counts(0, 50), counts(0, 50)]
    found = paired_difference(one, other)
    assert found.estimate == pytest.approx(0.9)
    # Each of the two prompts alone is drawn in a quarter of the resamples.
    assert (found.low, found.high) == pytest.approx((0.0, 1.0))


def test_the_same_drafter_does_not_differ() -> None:
    same = [counts(i, 10) for i in range(10)]
    found = paired_difference(same, same)
    assert (found.estimate, found.low, found.high) == (0, 0, 0)
    assert not found.is_sure


def test_a_seed_gives_the_same_interval_again() -> None:
    one = [counts(i % 7, 10) for i in range(30)]
    other = [counts(i % 5, 10) for i in range(30)]
    assert paired_difference(one, other, seed=3) == paired_difference(
        one, other, seed=3
    )


def test_prompts_without_a_draft_do_not_hurt() -> None:
    found = paired_difference(
        [counts(0, 0), counts(5, 10)], [counts(0, 0), counts(4, 10)]
    )
    assert found.estimate == pytest.approx(0.1)
    assert 0 <= found.low <= found.high <= 0.1 + 1e-9


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ([counts(1, 2)], [], "got 1 and 0 prompts"),
        ([], [], "no drafts"),
        ([counts(1, 2)], [counts(0, 0)], "no drafts"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    one: list[AcceptanceCounts], other: list[AcceptanceCounts], said: str
) -> None:
    with pytest.raises(MTPError, match=said):
        paired_difference(one, other)
