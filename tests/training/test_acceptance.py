# SPDX-License-Identifier: Apache-2.0
"""The loss that is minus the accepted drafts, against plain loops in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_spec.goldens import fill_weights
from tests.tiny_answers import MakeArguments
from tests.tiny_targets import VOCAB_SIZE
from vllm_mtp.drafter.layout import IGNORE_LABEL
from vllm_mtp.errors import MTPError
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import load_frozen
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.torch_host.texts import forward_texts
from vllm_mtp.training import token_loss
from vllm_mtp.training.loss_module import LossModule, LossPlan
from vllm_mtp.training.objective import Objective, position_losses

K = 4
KINDS: dict[str, dict[str, Any]] = {
    "whole target": {"layers": "shared:all", "lora_rank": 2},
    "own": {"layers": "own:3"},
    "reduced": {"layers": "own:3", "draft_vocab_size": 256},
}
# The second answer ends within blocks.
TEXTS: list[dict[str, Any]] = [
    {
        "index": index,
        "input_ids": torch.arange(size) * (37 + index) % VOCAB_SIZE,
        "loss_spans": [[4, size]],
    }
    for index, size in enumerate((30, 9))
]


def accepted(logits: torch.Tensor, labels: list[list[int]]) -> torch.Tensor:
    """Drafts of each block that a greedy target accepts, expected, summed; of
    ``logits`` ``[B, k, C]``."""
    total = torch.zeros((), dtype=torch.float64)
    for rows, block in zip(logits.double().softmax(-1), labels, strict=True):
        all_right = torch.ones((), dtype=torch.float64)
        for q, label in zip(rows, block, strict=True):
            if label < 0:
                break
            all_right = all_right * q[label]
            total = total + all_right
    return total


def test_it_is_the_sum_of_products() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, K, 11, generator=generator).mul(3).requires_grad_()
    labels = [[1, 2, 3, 4], [5, 6, IGNORE_LABEL, IGNORE_LABEL], [7, -100, 8, 9]]
    only = Objective(ce=0, acceptance=1)
    parts = position_losses(logits, torch.tensor(labels), only)
    assert set(parts) == {"acceptance"}
    (found,) = torch.autograd.grad(parts["acceptance"].sum(), logits)
    expected = accepted(logits, labels)
    torch.testing.assert_close(parts["acceptance"].sum().double(), -expected)
    (wanted,) = torch.autograd.grad(-expected, logits)
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-4)
    # What cannot be drafted ends a draft, and no gradient comes from behind it.
    assert found.abs().sum(-1).bool().tolist() == [
        [True] * 4, [True, True, False, False], [True, False, False, False],
    ]  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_improbable_labels_are_no_trouble(scale: float) -> None:
    logits = torch.zeros(1, K, 5)
    logits[..., 0] = scale
    logits.requires_grad_()
    only = Objective(ce=0, acceptance=1)
    loss = position_losses(logits, torch.ones(1, K).long(), only)["acceptance"].sum()
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert -1 < loss.item() <= 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_learns_it(
    kind: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In slices, and beside a cross-entropy whose positions have other weights."""
    # Gradients are small, and float32 alone is close to the bound on some CPUs.
    host = HFTarget(load_frozen(tiny_llama, "float64", "cpu"))
    options = {"dtype": "float32", "markov_rank": 4} | KINDS[kind]
    layers, size = options.pop("layers"), options.get("draft_vocab_size")
    tokens = range(0, VOCAB_SIZE, 2) if size else range(VOCAB_SIZE)
    drafter = new_drafter(
        tiny_llama, layers, K, DrafterOptions(**options), tokens if size else None
    ).double()
    assert drafter.markov is not None
    fill_weights(drafter.markov, 0.3, salt="acceptance ")

    def module(**objective: Any) -> LossModule:
        plan = LossPlan(Objective(position_decay=2.0, **objective), anchors_per_text=9)
        return LossModule(drafter, host, plan)

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        drafter.zero_grad()
        loss.backward()
        weights = drafter.named_parameters()
        return {n: p.grad.clone() for n, p in weights if p.grad is not None}

    both = module(ce=0.5, acceptance=2.0)
    blocks = [both.blocks(text, 0) for text in TEXTS]
    hidden = forward_texts(both.bound, blocks, K)
    labels = torch.cat([text.labels(K) for text in blocks])
    first = int(kind == "whole target")  # whose first position is always right
    logits = both.bound.logits(hidden)
    bias = drafter.markov(labels[:, :-1].clamp(min=0), hidden[:, 1:])
    logits = logits + torch.nn.functional.pad(bias, (0, 0, 1, 0))
    columns = [
        [tokens.index(t) if t in tokens else IGNORE_LABEL for t in row]
        for row in labels[:, first:].tolist()
    ]
    number = int((labels[:, first] != IGNORE_LABEL).sum())
    mean = accepted(logits[:, first:], columns) / (number * (K - first))
    assert 0 < mean < 1
    wanted = gradients(-2 * mean)
    alone = module(ce=0.5).loss_of(blocks)["loss"]
    of_ce = gradients(alone)
    monkeypatch.setattr(token_loss, "_CPU_LOGITS", 4 * K * len(tokens))
    found = both.loss_of(blocks)
    assert set(found) == {"loss", "ce", "acceptance"}
    torch.testing.assert_close(found["acceptance"].double(), -mean.detach())
    torch.testing.assert_close(found["loss"].double(), alone.double() - 2 * mean)
    summed = gradients(found["loss"])
    assert max(value.abs().max() for value in wanted.values()) > 1e-5
    for name, value in summed.items():
        expected = wanted[name] + of_ce[name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-3)


def test_it_can_come_after_cross_entropy(arguments: MakeArguments) -> None:
    args = arguments(ce_weight=0.0, acceptance_weight=1.0, ce_start_steps=2)
    plan = args.plan()
    start, then = (plan.schedule.objective(plan.objective, step) for step in (1, 2))
    assert (start.ce, start.acceptance) == (1.0, 0.0)
    assert (then.ce, then.acceptance) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"acceptance_weight": -1.0}, "acceptance_weight: got -1.0, expected 0"),
        ({"acceptance_weight": float("inf")}, "acceptance_weight: got inf"),
        (
            {"acceptance_weight": 1.0, "on_policy_weight": 0.5},
            "acceptance_weight: got 1.0, but on_policy_weight is 0.5.*leave one",
        ),
    ],
)
def test_what_means_nothing_is_refused(
    settings: dict[str, float], reason: str, arguments: MakeArguments
) -> None:
    with pytest.raises(MTPError, match=reason):
        arguments(**settings)
