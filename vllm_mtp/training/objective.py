# SPDX-License-Identifier: Apache-2.0
"""What a drafter is trained for: losses per position, and their weighted sum.

Dimensions: B blocks, k positions, C candidate tokens, N teacher tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_mtp.drafter.layout import IGNORE_LABEL
from vllm_mtp.errors import MTPError


@dataclass(frozen=True)
class Objective:
    """Weights of the losses.

    Attributes:
        ce: Cross-entropy on the target's own text.
        kl: KL from the target's distribution, cut to its N likeliest tokens and
            detached (MTP-D, 2603.23911).
        tv: Total variation distance to the same; one minus it is the rate at which
            rejection sampling accepts (LongSpark, 2609.37029, calls it L1).
        teacher_tokens: N.
        position_decay: Gamma of the positions' weights ``exp(-(i - 1) / gamma)``; None
            for equal weights.
    """

    ce: float = 1.0
    kl: float = 0.0
    tv: float = 0.0
    teacher_tokens: int = 64
    position_decay: float | None = None

    def __post_init__(self) -> None:
        weights = {"ce": self.ce, "kl": self.kl, "tv": self.tv}
        wrong = {name: w for name, w in weights.items() if not 0 <= w < float("inf")}
        if wrong or not any(weights.values()):
            raise MTPError(
                f"objective weights: got {weights}; expected numbers of 0 or more, and "
                "one of them above 0 (--ce-weight, --kl-weight, --tv-weight)"
            )
        if self.position_decay is not None and not self.position_decay > 0:
            raise MTPError(
                f"--position-decay: got {self.position_decay}, expected more than 0, "
                "or nothing for equal weights"
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
    """The target's likeliest tokens at each position, detached."""

    columns: torch.Tensor  # [B, k, N] int64, candidates
    probs: torch.Tensor  # [B, k, N] float32, over these N


def objective_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    objective: Objective,
    teacher: Teacher | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted loss of some blocks.

    Args:
        logits: ``[B, k, C]``.
        labels: ``[B, k]`` int64, candidates, or ``IGNORE_LABEL``: such a position
            counts nowhere.
        objective: The weights.
        teacher: Needed where ``objective.needs_teacher``.

    Returns:
        The loss, and each part's mean over the positions, detached.
    """
    valid = labels != IGNORE_LABEL
    normaliser = logits.float().logsumexp(-1, keepdim=True)
    parts: dict[str, torch.Tensor] = {}
    if objective.ce:
        chosen = logits.gather(-1, labels.clamp(min=0)[..., None])
        parts["ce"] = (normaliser - chosen.float())[..., 0]
    if objective.needs_teacher:
        assert teacher is not None, "the objective asks for a teacher"
        log_q = logits.gather(-1, teacher.columns).float() - normaliser
        parts |= _distances(log_q, teacher.probs, objective)
    weights = objective.position_weights(labels.shape[1]).to(logits.device)
    loss = torch.zeros((), device=logits.device)
    for name, values in parts.items():
        loss = loss + getattr(objective, name) * _mean(values, valid, weights)
    count = valid.sum().clamp(min=1)
    means = {name: values[valid].sum() / count for name, values in parts.items()}
    return loss, {name: value.detach() for name, value in means.items()}


def _distances(
    log_q: torch.Tensor, p: torch.Tensor, objective: Objective
) -> dict[str, torch.Tensor]:
    """KL and total variation per position, from ``[B, k, N]`` to ``[B, k]``."""
    parts = {}
    if objective.kl:
        parts["kl"] = (p * (p.clamp(min=1e-9).log() - log_q)).sum(-1)
    if objective.tv:
        # Both distributions sum to 1, so this counts the draft's mass elsewhere too.
        parts["tv"] = 1 - torch.minimum(p, log_q.exp()).sum(-1)
    return parts


def _mean(
    values: torch.Tensor, valid: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Mean over the blocks of each position ``[B, k]``, then their weighted sum."""
    counts = valid.sum(0).clamp(min=1)
    return (values.masked_fill(~valid, 0.0).sum(0) / counts * weights).sum()
