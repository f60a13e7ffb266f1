# SPDX-License-Identifier: Apache-2.0
"""The difference of two drafters on the same prompts, and how sure it is.

Prompts differ far more from each other than drafters do, so both drafters answer the
same ones, and whole prompts are drawn again: paired bootstrap, percentile interval
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993). What else may differ,
such as the seed of a training, is not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_mtp.errors import MTPError
from vllm_mtp.metrics import AcceptanceCounts

_AT_ONCE = 1000  # resamples; bounds the memory


@dataclass(frozen=True)
class Difference:
    """Acceptance length of one drafter less that of another.

    Attributes:
        estimate: On the prompts as they are.
        low: Lower end of the interval.
        high: Upper end.
        prompts: How many there were.
    """

    estimate: float
    low: float
    high: float
    prompts: int

    @property
    def is_sure(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def paired_difference(
    one: Sequence[AcceptanceCounts],
    other: Sequence[AcceptanceCounts],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Compare two drafters by their counts of each prompt.

    An acceptance length is a ratio of sums over prompts, also in every resample: long
    answers have more weight.

    Args:
        one: Counts of one drafter, a prompt each.
        other: Counts of the other one, the same prompts in the same order.
        resamples: How often as many prompts are drawn, with replacement.
        level: Of the interval.
        seed: Of the draws.

    Raises:
        MTPError: The numbers of prompts differ, or a side has no drafts.
    """
    if len(one) != len(other):
        raise MTPError(
            f"paired difference: got {len(one)} and {len(other)} prompts, expected the "
            "same prompts on both sides; evaluate both on the same rows"
        )
    sides = np.stack([_totals(one), _totals(other)])
    if not (sides[:, 1].sum(axis=1) > 0).all():
        raise MTPError(
            "paired difference: a side has no drafts; evaluate on answers of 2 tokens "
            "or more"
        )
    draws = np.random.default_rng(seed)
    count = len(one)
    found = []
    for start in range(0, resamples, _AT_ONCE):
        some = min(_AT_ONCE, resamples - start)
        times = draws.multinomial(count, np.full(count, 1 / count), size=some)
        found.append(_difference(sides @ times.T))
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(np.concatenate(found), [tail, 100 - tail])
    whole = _difference(sides.sum(axis=2, keepdims=True))
    return Difference(float(whole[0]), float(low), float(high), count)


def _totals(counts: Sequence[AcceptanceCounts]) -> np.ndarray:
    """Accepted tokens and drafts of each prompt. ``[2, prompts]``."""
    pairs = [(c.accepted_tokens, c.drafts) for c in counts]
    return np.array(pairs, dtype=np.float64).reshape(-1, 2).T


def _difference(sums: np.ndarray) -> np.ndarray:
    """Of sums ``[sides, accepted and drafts, resamples]``. ``[resamples]``."""
    accepted, drafts = sums[:, 0], sums[:, 1]
    # A resample of prompts without drafts alone has accepted nothing.
    lengths = accepted / np.maximum(drafts, 1)
    return lengths[0] - lengths[1]
