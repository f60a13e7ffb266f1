# SPDX-License-Identifier: Apache-2.0
"""peft's own forward with an adapter that acts on some rows alone, as Uno's does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec.goldens import fill_weights

ALL_MODULES = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
]


def with_adapter(model: PreTrainedModel, **settings: Any) -> PeftModel:
    """A model with an adapter that does something from the start."""
    values: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ALL_MODULES}
    adapted = get_peft_model(model, LoraConfig(**values | settings))
    pairs = torch.nn.ModuleList(
        part[name]
        for module in adapted.modules()
        for part in (getattr(module, "lora_A", None), getattr(module, "lora_B", None))
        if isinstance(part, torch.nn.ModuleDict)
        for name in part
    )
    fill_weights(pairs, 0.2)
    return adapted


def save_adapter(target: Path, folder: Path, **settings: Any) -> PeftModel:
    """What peft writes, and the model that it writes it of."""
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    adapted = with_adapter(model, **settings)
    adapted.save_pretrained(folder)
    return adapted


@contextmanager
def acting_on(adapted: PeftModel, rows: torch.Tensor) -> Iterator[None]:
    """The adapter changes the rows of ``rows`` ``[T]``, 0 or 1, and no others."""

    def mask(_: Any, __: Any, narrow: torch.Tensor) -> torch.Tensor:
        return narrow * rows[:, None]

    hooks = [
        narrow.register_forward_hook(mask)
        for module in adapted.modules()
        if isinstance(part := getattr(module, "lora_A", None), torch.nn.ModuleDict)
        for narrow in part.values()
    ]
    assert hooks, "the model has no pairs"
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def noise_logits(
    adapted: PeftModel, prefix: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Logits of the seed row and the noise rows behind it.

    Args:
        adapted: The model with its adapter.
        prefix: ``[B, T]``; the last token is the seed.
        noise: ``[B, K - 1]``.

    Returns:
        ``[B, K, V]``.
    """
    length, count = prefix.shape[1], noise.shape[1]
    rows = torch.cat([torch.zeros(length), torch.ones(count)])
    with acting_on(adapted, rows):
        return adapted(torch.cat([prefix, noise], dim=1)).logits[:, length - 1 :]
