# SPDX-License-Identifier: Apache-2.0
"""Muon for the matrices of own layers, another optimizer for all other weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from vllm_mtp.drafter.layers import OwnLayer

Group = dict[str, Any]


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers, each with groups of its own, that look like one.

    Trainer, its schedules and its checkpoints know a single optimizer. Groups and
    state are shared with the parts, so a learning rate set here is set there.

    Args:
        parts: The optimizers; no parameter may be in two of them.
    """

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self._parts = tuple(parts)
        groups = [group for part in self._parts for group in part.param_groups]
        super().__init__(groups, {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(dict(state_dict))
        self._share()


def muon(groups: list[Group]) -> torch.optim.Muon:
    """Muon with steps as large as AdamW's, so that learning rates mean the same.

    Orthogonalised momentum (Jordan 2024), scaled as in "Muon is Scalable for LLM
    Training" (arXiv 2502.16982).

    Args:
        groups: With ``params`` (matrices), ``lr`` and ``weight_decay``.
    """
    return torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw")


def groups_of(
    weights: Iterable[tuple[str, nn.Parameter]],
    learning_rate: float,
    weight_decay: float,
    scales: Mapping[str, float],
) -> list[Group]:
    """Parameter groups with learning rates of their own.

    Args:
        weights: A drafter's, by their names in it.
        learning_rate: Of all that ``scales`` does not name.
        weight_decay: Of matrices; vectors and placeholders are none to keep small.
        scales: Relative learning rates, by the first part of a weight's name.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in weights:
        scale = scales.get(name.partition(".")[0], 1.0)
        matrix = weight.ndim > 1 and not name.startswith("placeholders")
        decay = weight_decay if matrix else 0.0
        groups.setdefault((scale, decay), []).append(weight)
    return [
        {"params": p, "lr": learning_rate * scale, "weight_decay": decay}
        for (scale, decay), p in groups.items()
    ]


def own_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The weights that Muon is made for: matrices inside layers, here own layers."""
    return {
        parameter
        for layer in model.modules()
        if isinstance(layer, OwnLayer)
        for parameter in layer.parameters()
        if parameter.ndim == 2
    }
