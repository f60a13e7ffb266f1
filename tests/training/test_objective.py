# SPDX-License-Identifier: Apache-2.0
"""Losses against their textbook forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from vllm_mtp.drafter.layout import IGNORE_LABEL
from vllm_mtp.errors import MTPError
from vllm_mtp.training.objective import (
    Objective,
    Teacher,
    label_weights,
    position_losses,
    weighted_sum,
)

B, K, C = 5, 3, 11


@pytest.fixture
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, K, C, generator=generator).requires_grad_()


@pytest.fixture
def labels() -> torch.Tensor:
    labels = torch.arange(B * K).view(B, K) * 7 % C
    labels[0, 2] = labels[3, 1] = labels[3, 2] = IGNORE_LABEL
    return labels


def whole_teacher() -> Teacher:
    """A teacher that shows its whole distribution, in another order."""
    scores = torch.randn(B, K, C, generator=torch.Generator().manual_seed(2))
    best, columns = scores.topk(C)
    return Teacher(columns, best.softmax(-1))


def distribution(teacher: Teacher) -> torch.Tensor:
    assert teacher.columns is not None
    return torch.zeros(B, K, C).scatter_(-1, teacher.columns, teacher.probs)


def objective_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    objective: Objective,
    teacher: Teacher | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and each part at each position."""
    losses = position_losses(logits, labels, objective, teacher)
    return weighted_sum(losses, label_weights(labels, objective), objective), losses


def mean_over_positions(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    valid = labels != IGNORE_LABEL
    return torch.stack([values[valid[:, i], i].mean() for i in range(K)])


def test_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> None:
    loss, parts = objective_loss(logits, labels, Objective())
    each = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none"
    ).view(B, K)
    torch.testing.assert_close(loss, mean_over_positions(each, labels).mean())
    valid = labels != IGNORE_LABEL
    torch.testing.assert_close(parts["ce"][valid], each[valid])


def test_kl_over_everything_is_the_kl(
    logits: torch.Tensor, labels: torch.Tensor
) -> None:
    teacher = whole_teacher()
    loss, _ = objective_loss(logits, labels, Objective(ce=0, kl=1), teacher)
    each = F.kl_div(logits.log_softmax(-1), distribution(teacher), reduction="none")
    torch.testing.assert_close(loss, mean_over_positions(each.sum(-1), labels).mean())


def test_tv_over_everything_is_half_the_l1_distance(
    logits: torch.Tensor, labels: torch.Tensor
) -> None:
    teacher = whole_teacher()
    loss, _ = objective_loss(logits, labels, Objective(ce=0, tv=1), teacher)
    each = (logits.softmax(-1) - distribution(teacher)).abs().sum(-1) / 2
    torch.testing.assert_close(loss, mean_over_positions(each, labels).mean())


def test_a_mix_is_the_weighted_sum(logits: torch.Tensor, labels: torch.Tensor) -> None:
    teacher = whole_teacher()

    def loss(**weights: float) -> torch.Tensor:
        objective = Objective(**{"ce": 0.0} | weights)
        return objective_loss(logits, labels, objective, teacher)[0]

    torch.testing.assert_close(
        loss(ce=0.1, kl=0.5, tv=2.0),
        0.1 * loss(ce=1) + 0.5 * loss(kl=1) + 2.0 * loss(tv=1),
    )


def test_earlier_positions_weigh_more(
    logits: torch.Tensor, labels: torch.Tensor
) -> None:
    weights = Objective(position_decay=2.0).position_weights(K)
    torch.testing.assert_close(weights[1] / weights[0], torch.tensor(math.exp(-0.5)))
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    loss, _ = objective_loss(logits, labels, Objective(position_decay=1e-3))
    only_first, _ = objective_loss(logits[:, :1], labels[:, :1], Objective())
    torch.testing.assert_close(loss, only_first)


def test_ignored_positions_get_no_gradient(
    logits: torch.Tensor, labels: torch.Tensor
) -> None:
    objective = Objective(ce=1, kl=1, tv=1)
    objective_loss(logits, labels, objective, whole_teacher())[0].backward()
    assert logits.grad is not None
    moved = (logits.grad != 0).any(-1)
    assert moved.equal(labels != IGNORE_LABEL)


@pytest.mark.parametrize(
    "weights",
    [{"ce": 0.0}, {"ce": -1.0}, {"kl": math.inf}, {"position_decay": 0.0}],
)
def test_wrong_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(MTPError, match="expected"):
        Objective(**weights)
