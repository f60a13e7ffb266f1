# SPDX-License-Identifier: Apache-2.0
"""Two optimizers that look like one to Trainer."""

import copy

import pytest
import torch
from torch import nn

from vllm_mtp.training.optimizer import JointOptimizer, muon


def make() -> tuple[nn.ParameterList, JointOptimizer]:
    torch.manual_seed(0)
    weights = nn.ParameterList([torch.randn(6, 4), torch.randn(5)])
    parts = [
        muon([{"params": [weights[0]], "lr": 0.01, "weight_decay": 0.0}]),
        torch.optim.AdamW([{"params": [weights[1]], "lr": 0.01}]),
    ]
    return weights, JointOptimizer(parts)


def take_steps(weights: nn.ParameterList, optimizer: JointOptimizer, n: int) -> None:
    for _ in range(n):
        optimizer.zero_grad()
        sum((w - 1).pow(2).sum() for w in weights).backward()
        optimizer.step()


def test_every_weight_is_trained() -> None:
    weights, optimizer = make()
    before = [w.detach().clone() for w in weights]
    take_steps(weights, optimizer, 1)
    for old, new in zip(before, weights, strict=True):
        assert (old != new).all()


def test_matrices_take_orthogonal_steps_of_adamws_size() -> None:
    weights, optimizer = make()
    before = weights[0].detach().clone()
    take_steps(weights, optimizer, 1)
    step = (before - weights[0]).detach() / 0.01
    singular = torch.linalg.svdvals(step) / (0.2 * 6**0.5)
    # Five Newton-Schulz steps in bfloat16 end between 0.7 and 1.2.
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_schedules_reach_every_part() -> None:
    weights, optimizer = make()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [w.detach().clone() for w in weights]
    take_steps(weights, optimizer, 1)
    schedule.step()
    for old, new in zip(before, weights, strict=True):
        torch.testing.assert_close(old, new.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("used_before", [False, True])
def test_a_restored_one_goes_on_as_if_nothing_was(used_before: bool) -> None:
    weights, optimizer = make()
    take_steps(weights, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    twins, restored = make()
    twins.load_state_dict(weights.state_dict())
    if used_before:
        take_steps(twins, restored, 1)  # it has state of its own already
        twins.load_state_dict(weights.state_dict())
    restored.load_state_dict(state)
    for w, o in ((weights, optimizer), (twins, restored)):
        take_steps(w, o, 4)
    for ours, theirs in zip(twins, weights, strict=True):
        assert torch.equal(ours, theirs)
