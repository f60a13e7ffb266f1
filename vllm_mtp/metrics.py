# SPDX-License-Identifier: Apache-2.0
"""Acceptance, defined once, as vLLM defines it.

* acceptance rate: accepted draft tokens / draft tokens
* acceptance length: 1 + accepted draft tokens / drafts, in decoding. The 1 is the
  token that the target itself gives in every step (the bonus token).
* acceptance of position i: drafts whose first i tokens were all accepted / drafts.
  It is unconditional, so it never grows from one position to the next.

A "draft" is one drafting step of one request.

Teacher-forced, there is a draft behind every token of a known text. The same sum over
such drafts is another number, the teacher-forced length: decoding makes more of its
drafts where they fail, since it moves on by one token only there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

_PREFIX = "vllm:spec_decode_num_"


@dataclass(frozen=True)
class AcceptanceCounts:
    """Counters of one stretch of decoding; they add and subtract."""

    drafts: int
    draft_tokens: int
    accepted_per_position: tuple[int, ...]

    @property
    def accepted_tokens(self) -> int:
        return sum(self.accepted_per_position)

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted per target forward, bonus token included."""
        return mean_length(self)

    @property
    def acceptance_rate(self) -> float:
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0

    @property
    def acceptance_per_position(self) -> tuple[float, ...]:
        return tuple(n / max(self.drafts, 1) for n in self.accepted_per_position)

    def __sub__(self, earlier: "AcceptanceCounts") -> "AcceptanceCounts":
        return self._combined(earlier, -1)

    def __add__(self, other: "AcceptanceCounts") -> "AcceptanceCounts":
        return self._combined(other, 1)

    def _combined(self, other: "AcceptanceCounts", sign: int) -> "AcceptanceCounts":
        width = max(len(self.accepted_per_position), len(other.accepted_per_position))
        mine, theirs = (
            counts.accepted_per_position
            + (0,) * (width - len(counts.accepted_per_position))
            for counts in (self, other)
        )
        return AcceptanceCounts(
            self.drafts + sign * other.drafts,
            self.draft_tokens + sign * other.draft_tokens,
            tuple(a + sign * b for a, b in zip(mine, theirs, strict=True)),
        )


def mean_length(counts: AcceptanceCounts) -> float:
    """1 + accepted draft tokens / drafts, whatever the drafts are; 1 without any."""
    return 1 + counts.accepted_tokens / counts.drafts if counts.drafts else 1.0


def leading(drafted: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Which drafts are the tokens that did come, with all before them.

    Args:
        drafted: ``[B, k]`` int64; drafted tokens.
        truth: ``[B, k]`` int64; the target's own tokens at these positions. A
            position that was not reached holds a value that no token has.

    Returns:
        ``[B, k]`` int64, 1 where it holds.
    """
    return (drafted == truth).long().cumprod(dim=1)


def count_accepted(drafted: torch.Tensor, truth: torch.Tensor) -> AcceptanceCounts:
    """Count greedy acceptance of drafts against the tokens that did come.

    Args:
        drafted: As in `leading`.
        truth: Likewise.
    """
    accepted = leading(drafted, truth).sum(dim=0)
    return AcceptanceCounts(drafted.shape[0], drafted.numel(), tuple(accepted.tolist()))


def read_vllm_counters(metrics: Iterable[Any]) -> AcceptanceCounts:
    """Counters so far from ``LLM.get_metrics()``.

    vLLM counts from the engine's start: subtract an earlier reading.

    Args:
        metrics: vLLM's ``Counter`` and ``Vector`` objects; others are skipped.
    """
    totals = {"drafts": 0, "draft_tokens": 0}
    per_position: list[int] = []
    for metric in metrics:
        name = metric.name.removeprefix(_PREFIX)
        if name in totals:
            totals[name] += int(metric.value)
        elif name == "accepted_tokens_per_pos":
            # One vector per engine (data parallel): add them up.
            sums = zip_longest(per_position, metric.values, fillvalue=0)
            per_position = [int(a) + int(b) for a, b in sums]
    return AcceptanceCounts(
        totals["drafts"], totals["draft_tokens"], tuple(per_position)
    )
