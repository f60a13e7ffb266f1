# SPDX-License-Identifier: Apache-2.0
"""Compare greedy outputs with and without speculation.

Verifying k + 1 rows at once uses other kernel shapes than decoding one row, so
logits can differ in the last bit, and two tokens that tie can change places.
Only such a tie is accepted, and it must be shown by the reference's own
logprobs. After it the two texts may go apart: nothing later is compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

BF16_TIE_MARGIN = 0.25
"""Largest logprob gap of a tie in bfloat16: two steps of 0.125, which is one
rounding step of a logit between 16 and 32."""


@dataclass(frozen=True)
class Comparison:
    """Result of comparing one output.

    Attributes:
        verdict: ``equal``, ``tie`` (differs first at a proven float tie) or
            ``different``.
        position: Index of the first differing token, or None.
        gap: The reference's logprob difference of the two tokens there.
    """

    verdict: Literal["equal", "tie", "different"]
    position: int | None = None
    gap: float | None = None


def compare_greedy(
    reference: Sequence[int],
    reference_logprobs: Sequence[Mapping[int, Any]],
    other: Sequence[int],
    *,
    tie_margin: float = 0.0,
) -> Comparison:
    """Compare a speculative output with the reference.

    Args:
        reference: Token ids without speculation.
        reference_logprobs: vLLM's top logprobs of each reference token (token id
            to an object with ``logprob``).
        other: Token ids with speculation.
        tie_margin: Largest gap, in nats, that counts as a tie; 0 accepts none.
    """
    if list(reference) == list(other):
        return Comparison("equal")
    pairs = zip(reference, other, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if position is None:
        return Comparison("different", min(len(reference), len(other)))
    # Where none were asked for, a tie cannot be told from a difference.
    top = reference_logprobs[position] if reference_logprobs else {}
    if other[position] not in top:
        return Comparison("different", position)
    gap = top[reference[position]].logprob - top[other[position]].logprob
    is_tie = tie_margin > 0 and 0 <= gap <= tie_margin
    return Comparison("tie" if is_tie else "different", position, gap)
