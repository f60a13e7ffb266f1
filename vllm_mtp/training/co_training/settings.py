# SPDX-License-Identifier: Apache-2.0
"""How a drafter is trained beside its target."""

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_mtp.drafter.model import Drafter
from vllm_mtp.errors import refusal_of
from vllm_mtp.training.loss_module import LossPlan
from vllm_mtp.training.objective import Objective
from vllm_mtp.training.optimizer import optimizer_of
from vllm_mtp.training.states import TrainingInputError


class CoTrainingSettings(BaseModel):
    """Names and meanings are those of `vllm-mtp train`, where it has them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    every: int = Field(1, ge=1, description="Train at every so many optimizer steps.")
    learning_rate: float = Field(5e-4, gt=0)
    lr_scheduler_type: Literal[
        "constant", "constant_with_warmup", "linear", "cosine"
    ] = "cosine"
    warmup_steps: int = Field(0, ge=0, description="Of the drafter's own steps.")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    own_optimizer: Literal["adamw", "muon"] = "adamw"
    placeholder_lr_scale: float = Field(10.0, gt=0)
    markov_lr_scale: float = Field(1.0, gt=0)
    ce_weight: float = Field(0.5, ge=0)
    kl_weight: float = Field(0.5, ge=0)
    tv_weight: float = Field(0.0, ge=0)
    acceptance_weight: float = Field(0.0, ge=0)
    teacher_tokens: int = Field(64, ge=0, description="0 for all that are scored.")
    position_decay: float | None = Field(None, gt=0)
    anchors_per_text: int = Field(64, ge=1)
    max_text_tokens: int = Field(2048, ge=3)
    gradient_checkpointing: bool = True
    seed: int = Field(42, ge=0)

    def plan(self) -> LossPlan:
        """What a step learns from texts. States are never kept: the target moves on."""
        return LossPlan(
            objective=Objective.of_settings(self),
            anchors_per_text=self.anchors_per_text,
            seed=self.seed,
        )

    def optimizer(self, drafter: Drafter) -> torch.optim.Optimizer:
        """AdamW, or Muon for the matrices of own layers and AdamW for the rest."""
        return optimizer_of(drafter, self, torch.optim.AdamW)


def checked(settings: dict[str, Any]) -> CoTrainingSettings:
    """What the user gave.

    Raises:
        MTPError: The first thing that is wrong with it.
    """
    try:
        made = CoTrainingSettings(**settings)
    except ValidationError as error:
        raise TrainingInputError(f"co_train: {refusal_of(error)}") from None
    made.plan()  # the weights together
    return made
