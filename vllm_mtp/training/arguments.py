# SPDX-License-Identifier: Apache-2.0
"""Every setting of a training run, in one dataclass: flags and YAML keys alike."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from vllm_mtp.block import BlockReads
from vllm_mtp.errors import MTPError
from vllm_mtp.modeling.design import DrafterDesign
from vllm_mtp.training.learner import LessonPlan
from vllm_mtp.training.objective import Objective


def _flag(help_text: str, default: Any = None) -> Any:
    if isinstance(default, list):
        return field(
            default_factory=lambda: list(default), metadata={"help": help_text}
        )
    return field(default=default, metadata={"help": help_text})


@dataclass(kw_only=True)
class DrafterTrainingArguments(DrafterDesign, TrainingArguments):
    """transformers' training arguments, and what a drafter adds to them."""

    target: str = _flag("the target's folder or hub name", "")
    data: str = _flag("folder written by `vllm-mtp generate`", "")

    warm_start: str | None = _flag("start from this drafter where the weights fit")
    stages: list[str] = _flag(
        "layer lists to train before `layers`, each starting from the one before "
        "(healing: take layers out step by step)",
        [],
    )
    stage_steps: int = _flag("optimizer steps of each of these stages", 0)
    train_only: Literal["all", "new_places"] = _flag(
        "new_places: keep what came with warm_start as it is, and train the added "
        "placeholders alone (looped extension)",
        "all",
    )

    ce_weight: float = _flag("weight of cross-entropy on the target's text", 1.0)
    kl_weight: float = _flag("weight of the KL from the target's likeliest tokens", 0.0)
    tv_weight: float = _flag("weight of the total variation to the same", 0.0)
    feature_weight: float = _flag("weight of the feature loss of own layers", 0.0)
    teacher_tokens: int = _flag("how many likeliest tokens", 64)
    place_decay: float | None = _flag("gamma of place weights exp(-(i-1)/gamma)")

    anchors_per_text: int = _flag("most blocks behind one text in one step", 64)
    train_texts: int | None = _flag("train on this many texts (default: all)")
    max_text_tokens: int = _flag("longer texts are cut here", 2048)
    loss_vocab_size: int | None = _flag(
        "score only this many frequent tokens and the batch's labels while training"
    )
    states_budget_gb: float = _flag("memory for keeping the target's states", 4.0)
    read_later_rows: bool = _flag(
        "let rows read the later rows of their block (an experiment: not servable)",
        False,
    )
    read_prefix: bool = _flag(
        "let rows read the prefix's keys and values (false: an experiment, not "
        "servable)",
        True,
    )

    placeholder_lr_scale: float = _flag("learning rate of placeholders, relative", 10.0)
    markov_lr_scale: float = _flag("learning rate of the correction, relative", 1.0)
    eval_texts: int = _flag("held-out texts that are evaluated while training", 32)
    eval_anchors: int = _flag("blocks per text in these evaluations", 64)

    # Defaults of ours where transformers' do not fit this task.
    learning_rate: float = _flag("peak learning rate", 1e-3)
    lr_scheduler_type: str = _flag("as in transformers", "cosine")
    per_device_train_batch_size: int = _flag("texts per step and device", 4)
    per_device_eval_batch_size: int = _flag("texts per evaluation step", 4)
    logging_steps: float = _flag("steps between two lines of the log", 10)
    report_to: list[str] = _flag("where the log goes too", ["tensorboard"])
    remove_unused_columns: bool = _flag("as in transformers", False)
    save_total_limit: int | None = _flag("checkpoints to keep", 2)

    def __post_init__(self) -> None:
        if not self.target or not self.data:
            raise MTPError(
                f"target: got {self.target!r}, data: got {self.data!r}; both are "
                "needed (the target's folder, and the folder of its own answers)"
            )
        if self.train_only == "new_places" and not self.warm_start:
            raise MTPError("train_only: new_places needs warm_start, a trained drafter")
        # transformers wants to be told, or it refuses bf16 where there is no GPU.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()

    def plan(self) -> LessonPlan:
        """How texts become lessons."""
        return LessonPlan(
            objective=Objective(
                self.ce_weight,
                self.kl_weight,
                self.tv_weight,
                self.teacher_tokens,
                self.place_decay,
            ),
            anchors_per_text=self.anchors_per_text,
            feature_weight=self.feature_weight,
            reads=self.reads(),
            states_budget=self.states_budget_gb * 2**30,
            seed=self.seed,
        )

    def reads(self) -> BlockReads:
        return BlockReads(prefix=self.read_prefix, later_rows=self.read_later_rows)
