# SPDX-License-Identifier: Apache-2.0
"""What a training step keeps does not grow with rows times prefix or vocabulary."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoints_spec.goldens import fill_weights
from tests.tiny_targets import VOCAB_SIZE
from tools.step_memory import peak_bytes
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.torch_host import block_attention
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import load_frozen
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.training import token_loss
from vllm_mtp.training.loss_module import LossModule, LossPlan
from vllm_mtp.training.objective import Objective

K, SIZE = 4, 300
TEXTS: list[dict[str, Any]] = [
    {
        "index": i,
        "input_ids": torch.arange(SIZE - i) * (7 + i) % VOCAB_SIZE,
        "loss_spans": [[3, 140], [151, SIZE - i]],
    }
    for i in range(2)
]
MIX = Objective(ce=0.3, kl=0.2, tv=0.5, position_decay=3.0)


@pytest.fixture(scope="module")
def host(tiny_llama: Path) -> HFTarget:
    return HFTarget(load_frozen(tiny_llama, "float32", "cpu"))


def lesson(
    host: HFTarget, target: Path, layers: str, *, plan: LossPlan, **options: Any
) -> LossModule:
    """A drafter in its target's type."""
    chosen = DrafterOptions(dtype="float32", **options)
    tokens = range(0, VOCAB_SIZE, VOCAB_SIZE // 100)[:100]
    vocab = tuple(tokens) if chosen.draft_vocab_size else None
    drafter: Drafter = new_drafter(target, layers, K, chosen, vocab)
    fill_weights(drafter, 0.1, salt="memory ")
    drafter.to(host.model.dtype)
    return LossModule(drafter, host, plan)


def step(module: LossModule) -> dict[str, torch.Tensor]:
    """The losses and all gradients of a step."""
    module.zero_grad()
    found = module(TEXTS, step=5)
    found["loss"].backward()
    gradients = {n: w.grad.clone() for n, w in module.named_parameters()}
    return {name: value.detach() for name, value in found.items()} | gradients


KINDS = [
    ("shared:all", {"lora_rank": 2, "markov_rank": 3}),
    ("shared:0,own:1,3", {"bridges": True, "boundary_hidden": "all"}),
    ("own:0,3", {"draft_vocab_size": 100, "markov_rank": 3}),
    ("mlp:1", {"input": "boundary", "lm_head": "own", "draft_vocab_size": 100}),
]


@pytest.mark.parametrize(("layers", "options"), KINDS, ids=[k[0] for k in KINDS])
@pytest.mark.parametrize("teacher_tokens", [9, 0])
def test_a_step_in_slices_is_the_whole_step(
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    layers: str,
    options: dict[str, Any],
    teacher_tokens: int,
) -> None:
    objective = Objective(**vars(MIX) | {"teacher_tokens": teacher_tokens})
    plan = LossPlan(objective, anchors_per_text=9)
    # Slices are summed in another order, which in float32 alone makes differences as
    # large as the bound on some CPUs. Here only the losses themselves are in float32.
    wide = HFTarget(load_frozen(tiny_llama, "float64", "cpu"))
    module = lesson(wide, tiny_llama, layers, plan=plan, **options)
    whole = step(module)
    monkeypatch.setattr(block_attention, "_CPU_SCORES", 2000)
    monkeypatch.setattr(block_attention, "_CPU_KEPT_SCORES", 0)
    # The second bounds those of heads that are trained.
    monkeypatch.setattr(token_loss, "_CPU_LOGITS", 3 * K * VOCAB_SIZE)
    monkeypatch.setattr(token_loss, "GPU_LOGITS", 3 * K * VOCAB_SIZE)
    module.gradient_checkpointing_enable()
    torch.testing.assert_close(step(module), whole, rtol=1.3e-6, atol=1e-5)


class _RepeatedMatrices(TorchDispatchMode):
    """Products that take one matrix for many others, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[torch.Size]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.bmm.default and any(
            len(each) > 1 and each.stride(0) == 0 for each in args
        ):
            self.found.append([each.shape for each in args])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("layers", "options"), KINDS, ids=[k[0] for k in KINDS])
def test_weights_are_multiplied_once_for_all_blocks(
    host: HFTarget, tiny_llama: Path, layers: str, options: dict[str, Any]
) -> None:
    with _RepeatedMatrices() as seen:
        torch.nn.functional.linear(torch.ones(3, 4, 5)[:, 1:], torch.ones(2, 5))
    assert seen.found, "torch does not do that any more"
    objective = Objective(**vars(MIX) | {"teacher_tokens": 0})
    plan = LossPlan(objective, anchors_per_text=9, on_policy_weight=0.5)
    module = lesson(host, tiny_llama, layers, plan=plan, **options)
    with _RepeatedMatrices() as seen:
        step(module)
    assert not seen.found


def test_what_the_layers_keep(
    host: HFTarget, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = LossPlan(MIX, anchors_per_text=120)
    module = lesson(host, tiny_llama, "own:0,1,2,3", plan=plan)
    step(module)  # so that all weights have gradients

    def peak() -> int:
        return peak_bytes(lambda: module(TEXTS, step=5)["loss"].backward())

    whole = peak()
    module.gradient_checkpointing_enable()
    recomputed = peak()
    assert recomputed < 0.7 * whole
    monkeypatch.setattr(block_attention, "_CPU_SCORES", 20_000)
    monkeypatch.setattr(block_attention, "_CPU_KEPT_SCORES", 0)
    assert peak() < 0.75 * recomputed


@pytest.mark.parametrize("teacher_tokens", [64, 0])
def test_what_the_loss_keeps(
    host: HFTarget,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    teacher_tokens: int,
) -> None:
    objective = Objective(**vars(MIX) | {"teacher_tokens": teacher_tokens})
    plan = LossPlan(objective, anchors_per_text=120)
    module = lesson(host, tiny_llama, "own:0", plan=plan)
    texts = [module.blocks(text, 0) for text in TEXTS]
    labels = torch.cat([text.labels(K) for text in texts])
    hidden = torch.randn(*labels.shape, 64, requires_grad=True)

    def peak() -> int:
        def step() -> None:
            module.token_loss(objective, texts, hidden, labels)[0].backward()

        return peak_bytes(step)

    whole = peak()
    assert whole > 2 * 4 * labels.numel() * VOCAB_SIZE
    monkeypatch.setattr(token_loss, "_CPU_LOGITS", 20_000)
    # In bytes less than 0.2 of what the whole took when a logit was written five times.
    assert peak() < 0.25 * whole


def test_evaluations_keep_nothing(host: HFTarget, tiny_llama: Path) -> None:
    module = lesson(host, tiny_llama, "own:0,3", plan=LossPlan(MIX))
    expected = module(TEXTS, step=5)["loss"]
    with torch.no_grad():
        found = module(TEXTS, step=5)["loss"]
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad
