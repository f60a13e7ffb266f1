# SPDX-License-Identifier: Apache-2.0
"""The optimizer of a run: parameter groups with learning rates of their own, and Muon
for the matrices of own layers where it is asked for."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from vllm_mtp.drafter.layers import OwnLayer

if TYPE_CHECKING:
    from vllm_mtp.training.arguments import DrafterTrainingArguments
    from vllm_mtp.training.co_training.settings import CoTrainingSettings

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
        weight_decay: Of matrices; vectors, also one for each position, and rows that
            enter the layers are none to keep small.
        scales: Relative learning rates, by the first part of a weight's name.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in weights:
        scale = scales.get(name.partition(".")[0], 1.0)
        vectors = name.startswith(("placeholders", "extra_rows"))
        matrix = weight.ndim > 1 and not vectors and not name.endswith("bias")
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
        for name, parameter in layer.named_parameters()
        if parameter.ndim == 2 and not name.endswith("bias")
    }


def make_optimizer(
    loss_module: nn.Module, args: "DrafterTrainingArguments"
) -> torch.optim.Optimizer:
    """The optimizer of a run.

    Args:
        loss_module: With the drafter's weights, named ``drafter.*``.
        args: The settings.
    """
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    return optimizer_of(loss_module, args, partial(kind, **settings))


def optimizer_of(
    module: nn.Module,
    args: "DrafterTrainingArguments | CoTrainingSettings",
    kind: Callable[[list[Group]], torch.optim.Optimizer],
) -> torch.optim.Optimizer:
    """An optimizer of the weights that require gradients.

    Args:
        module: The drafter, or what holds it as ``drafter``.
        args: The learning rates, and whether Muon is asked for.
        kind: Makes the optimizer of all that Muon does not train.
    """
    weights = [
        (name.removeprefix("drafter."), weight)
        for name, weight in module.named_parameters()
        if weight.requires_grad
    ]

    # Decay would move positions that are to stay as they are, gradient or not.
    keeps_some = getattr(args, "train_only", "all") == "new_positions"
    decay = 0.0 if keeps_some else args.weight_decay

    def groups(chosen: Iterable[tuple[str, nn.Parameter]]) -> list[Group]:
        scales = {
            "placeholders": args.placeholder_lr_scale,
            "extra_rows": args.placeholder_lr_scale,
            "markov": args.markov_lr_scale,
        }
        return groups_of(chosen, args.learning_rate, decay, scales)

    matrices = own_matrices(module) if args.own_optimizer == "muon" else ()
    of_matrices = groups((n, w) for n, w in weights if w in matrices)
    others = groups((n, w) for n, w in weights if w not in matrices)
    if not of_matrices:
        return kind(others)
    parts: list[torch.optim.Optimizer] = [muon(of_matrices)]
    return JointOptimizer([*parts, kind(others)] if others else parts)
