# SPDX-License-Identifier: Apache-2.0
"""What a drafter is trained for: losses per position, and their weighted sum.

Dimensions: B blocks, k positions, C candidate tokens, N teacher tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_mtp.drafter.layout import IGNORE_LABEL
from vllm_mtp.errors import MTPError


@dataclass(frozen=True)
class Objective:
    """Weights of the losses.

    Attributes:
        ce: Cross-entropy on the target's own text.
        kl: KL from the target's distribution, cut to its N likeliest tokens and
            detached (MTP-D, 2603.23911), or whole.
        tv: Total variation distance to the same; one minus it is the rate at which
            rejection sampling accepts (LongSpark, 2609.37029, calls it L1).
        teacher_tokens: N; 0 for all tokens that are scored, which makes KL and TV
            exact.
        position_decay: Gamma of the positions' weights ``exp(-(i - 1) / gamma)``; None
            for equal weights.
        acceptance: Minus the tokens of a draft that are accepted when they are drawn
            from the drafter and the target is greedy: the sum over i of the product of
            the first i labels' probabilities, over the number of positions. Products
            weigh the positions already, so ``position_decay`` does not act on them. LK
            losses (2602.23881) and Uno (2609.04010) train each position's acceptance by
            itself; we know no paper that has the product.
    """

    ce: float = 1.0
    kl: float = 0.0
    tv: float = 0.0
    teacher_tokens: int = 64
    position_decay: float | None = None
    acceptance: float = 0.0

    def __post_init__(self) -> None:
        names = ("ce", "kl", "tv", "acceptance")
        weights = {name: getattr(self, name) for name in names}
        wrong = {name: w for name, w in weights.items() if not 0 <= w < float("inf")}
        if wrong or not any(weights.values()):
            raise MTPError(
                f"objective weights: got {weights}; expected numbers of 0 or more, and "
                "one of them above 0 (ce_weight, kl_weight, tv_weight, "
                "acceptance_weight)"
            )
        if self.position_decay is not None and not self.position_decay > 0:
            raise MTPError(
                f"--position-decay: got {self.position_decay}, expected more than 0, "
                "or nothing for equal weights"
            )

    @classmethod
    def of_settings(cls, settings: Any) -> "Objective":
        """The objective that a run's settings name, `train`'s or `co_train`'s."""
        return cls(
            settings.ce_weight,
            settings.kl_weight,
            settings.tv_weight,
            settings.teacher_tokens,
            settings.position_decay,
            settings.acceptance_weight,
        )

    @property
    def needs_teacher(self) -> bool:
        return self.kl > 0 or self.tv > 0

    def position_weights(self, num_draft_tokens: int) -> torch.Tensor:
        """``[k]`` float32, summing to 1."""
        positions = torch.arange(num_draft_tokens, dtype=torch.float32)
        if self.position_decay is None:
            return torch.full((num_draft_tokens,), 1 / num_draft_tokens)
        weights = torch.exp(-positions / self.position_decay)
        return weights / weights.sum()


class Teacher(NamedTuple):
    """The target's distribution at each position, detached."""

    columns: torch.Tensor | None  # [B, k, N] int64, candidates; None for all C of them
    probs: torch.Tensor  # [B, k, N] or [B, k, C] float32


def position_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    objective: Objective,
    teacher: Teacher | None = None,
) -> dict[str, torch.Tensor]:
    """Each part of the loss at each position.

    Args:
        logits: ``[B, k, C]``.
        labels: ``[B, k]`` int64, candidates; others mean nothing where negative, but
            that no draft goes further.
        objective: Which parts.
        teacher: Needed where ``objective.needs_teacher``.

    Returns:
        ``[B, k]`` float32 by the part's name. Of ``acceptance``: minus the probability
        that all drafts up to there are right.
    """
    log_q = logits.float().log_softmax(-1)
    columns = labels.clamp(min=0)[..., None]
    if teacher is not None and teacher.columns is not None:
        # In one gather: the backward of each writes all logits.
        columns = torch.cat([columns, teacher.columns], dim=-1)
    chosen = log_q.gather(-1, columns)
    of_labels = chosen[..., 0]
    parts: dict[str, torch.Tensor] = {}
    if objective.ce:
        parts["ce"] = -of_labels
    if objective.acceptance:
        unknown = labels == IGNORE_LABEL
        so_far = of_labels.masked_fill(unknown, -torch.inf).cumsum(-1)
        parts["acceptance"] = -so_far.exp()
    if objective.needs_teacher:
        assert teacher is not None, "the objective asks for a teacher"
        p = teacher.probs
        if teacher.columns is not None:
            log_q = chosen[..., 1:]
        if objective.kl:
            parts["kl"] = (p * (p.clamp(min=1e-9).log() - log_q)).sum(-1)
        if objective.tv:
            # The draft's mass elsewhere counts too: both distributions sum to 1.
            parts["tv"] = 1 - torch.minimum(p, log_q.exp()).sum(-1)
    return parts


def label_weights(
    labels: torch.Tensor, objective: Objective, counts: torch.Tensor | None = None
) -> torch.Tensor:
    """How much each label counts: a position's weight over the number of its labels.

    A sum with these weights is a mean over the blocks of each position, and then the
    weighted mean of the positions.

    Args:
        labels: ``[B, k]`` int64; ``IGNORE_LABEL`` counts nowhere.
        objective: Has the positions' weights.
        counts: ``[k]`` int64, labels at each position of all blocks that the means
            are over, where these are some of them; None where these are all. The
            sum over all parts is then what all blocks together would give.

    Returns:
        ``[B, k]`` float32.
    """
    valid = labels != IGNORE_LABEL
    counts = valid.sum(0) if counts is None else counts
    weights = objective.position_weights(labels.shape[1]).to(labels.device)
    return valid * (weights / counts.clamp(min=1))


def weighted_sum(
    losses: Mapping[str, torch.Tensor],
    weights: torch.Tensor,
    objective: Objective,
    block_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The objective's loss.

    Args:
        losses: `position_losses`.
        weights: `label_weights`.
        objective: Has the weights of the losses.
        block_weights: ``[B, 1]`` float32; what each position of a block counts in
            ``acceptance``, of which a block has one value for all its positions.
    """
    loss = torch.zeros((), device=weights.device)
    for name, values in losses.items():
        of_values = weights
        if name == "acceptance":
            assert block_weights is not None, "it is no mean over labels"
            of_values = block_weights.expand_as(values)
        values = values.masked_fill(of_values == 0, 0.0)
        loss = loss + getattr(objective, name) * (values * of_values).sum()
    return loss
