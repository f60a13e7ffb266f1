# SPDX-License-Identifier: Apache-2.0
"""The target's LM head: what follows it, and its rows of some tokens alone."""

from typing import Any, NamedTuple

import torch
from torch import nn


class SmallHead(nn.Module):
    """The rows of the target's LM head that belong to some tokens."""

    def __init__(self, weight: torch.Tensor, shaping: "Shaping") -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.shaping = shaping

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., hidden_size]`` to ``[..., tokens]``."""
        return self.shaping.of(nn.functional.linear(hidden, self.weight))


class Shaping(NamedTuple):
    """What follows the LM head: a factor, a cap, and another factor."""

    before: float
    soft_cap: float | None
    after: float

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        """Same shape."""
        if self.before != 1.0:
            logits = logits * self.before
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits if self.after == 1.0 else logits * self.after


def shaping_of(config: Any) -> Shaping:
    def number(name: str) -> float:
        return getattr(config, name, None) or 1.0

    return Shaping(
        number("output_multiplier"),
        getattr(config, "final_logit_softcapping", None),
        number("logit_scale") / number("logits_scaling"),
    )
