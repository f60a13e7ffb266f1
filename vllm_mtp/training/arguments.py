# SPDX-License-Identifier: Apache-2.0
"""Every setting of a training run, in one dataclass: flags and YAML keys alike."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import TrainingArguments
from transformers.integrations import (
    is_tensorboard_available,
)

from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.layer_spec import EXAMPLES
from vllm_mtp.drafter.options import DrafterOptions, help_of
from vllm_mtp.drafter.unused import require_used
from vllm_mtp.errors import MTPError
from vllm_mtp.flags import flag
from vllm_mtp.training.inherited import refuse_inherited
from vllm_mtp.training.loss_module import LossPlan
from vllm_mtp.training.objective import Objective
from vllm_mtp.training.requirements import (
    METRICS,
    REQUIREMENTS,
    require_decay,
    try_loop,
)
from vllm_mtp.training.schedule import Schedule

logger = logging.getLogger("vllm.mtp_placeholder.training")


@dataclass(kw_only=True)
class DrafterTrainingArguments(DrafterOptions, TrainingArguments):
    """transformers' training arguments, and what a drafter adds to them."""

    needs_data: ClassVar[bool] = True  # a plan can do without

    target: str = flag("the target's folder or hub name", "")
    data: list[str] = flag(
        "folder written by `vllm-mtp generate`; or several of one target's", []
    )
    layers: str = flag(f"such as {EXAMPLES}", "shared:all")
    num_speculative_tokens: int = flag(
        help_of(DrafterConfig, "num_speculative_tokens"), 4
    )

    warm_start: str | None = flag("start from this drafter where the weights fit", None)
    stages: list[str] = flag(
        "layer lists to train before `layers`, each starting from the one before "
        "(healing: take layers out step by step)",
        [],
    )
    stage_steps: int = flag("optimizer steps of each of these stages", 0)
    bridge_texts: int = flag(
        "fit new bridges to this many texts before training (0: they start as nothing)",
        128,
    )
    train_only: Literal["all", "new_positions"] = flag(
        "new_positions: keep what came with warm_start as it is, and train the added "
        "positions' placeholders and weights alone (looped extension)",
        "all",
    )

    ce_weight: float = flag("weight of cross-entropy on the target's text", 1.0)
    kl_weight: float = flag("weight of the KL from the target's likeliest tokens", 0.0)
    tv_weight: float = flag("weight of the total variation to the same", 0.0)
    feature_weight: float = flag("weight of the feature loss of own layers", 0.0)
    acceptance_weight: float = flag(
        "weight of minus the expected number of accepted drafts, over the number of "
        "positions: the products of the first labels' probabilities, summed",
        0.0,
    )
    teacher_tokens: int = flag(
        "how many likeliest tokens; 0: all that are scored, which makes both exact", 64
    )
    position_decay: float | None = flag(
        "gamma of position weights exp(-(i-1)/gamma)", None
    )
    on_policy_weight: float = flag(
        "which part of this loss is of spans that the drafter drafts itself, as the "
        "target goes on behind each of their tokens; the rest is of the text (0 to 1)",
        0.0,
    )
    unvisited_weight: float = flag(
        "what the loss of a block counts where greedy decoding with the drafter, as it "
        "is at that step, would not draft (0 to 1). Below 1 a text's blocks stand "
        "behind tokens that follow each other, and the loss, which is divided by all "
        "blocks, gets smaller",
        1.0,
    )
    ce_start_steps: int = flag(
        "for so many optimizer steps (of each stage) the loss is cross-entropy alone, "
        "then what the weights say",
        0,
    )

    train_places: int | None = flag(
        "teach only the first so many positions (default: all); shorter blocks leave "
        "time for more of them",
        None,
    )
    curriculum_steps: int = flag(
        "begin with two positions and teach one more after every so many optimizer "
        "steps, in each stage anew (0: all from the start)",
        0,
    )
    anchors_per_text: int = flag("most blocks behind one text in one step", 64)
    train_texts: int | None = flag("train on this many texts (default: all)", None)
    max_text_tokens: int = flag("longer texts are cut here", 2048)
    loss_vocab_size: int | None = flag(
        "score only this many frequent tokens and the batch's labels while training",
        None,
    )
    target_device_map: Literal[
        "one", "auto", "balanced", "balanced_low_0", "sequential"
    ] = flag(
        "one: the target is on one GPU, that of its drafter; else it is divided over "
        "all GPUs, as accelerate's device_map of that name does (balanced_low_0 leaves "
        "most room on the first one, where the drafter is)",
        "one",
    )
    block_attention: Literal["slices", "flex"] = flag(
        "how blocks attend: a slice of them at a time, in plain torch; or by torch's "
        "FlexAttention, one compiled kernel (NVIDIA GPUs only)",
        "slices",
    )
    states_budget_gb: float | None = flag(
        "memory for keeping the target's states of texts that come again (default: 4 "
        "on a CPU, none elsewhere)",
        None,
    )
    states_folder: str | None = flag(
        "folder for keeping them on disk, for runs that read the same texts: saves "
        "about a third of a step's work, and takes some kB for each token",
        None,
    )

    own_optimizer: Literal["as_optim", "muon"] = flag(
        "muon: train the matrices of own layers with Muon, and all else with `optim`",
        "as_optim",
    )
    ema_decay: float | None = flag(
        "save, and evaluate in the end, an exponential moving average of the trained "
        "weights: so much of it stays in each step (0.999 averages over about 1,000 "
        "steps; default: the last step's weights)",
        None,
    )
    placeholder_lr_scale: float = flag("learning rate of placeholders, relative", 10.0)
    markov_lr_scale: float = flag("learning rate of the correction, relative", 1.0)
    eval_texts: int = flag("held-out texts that are evaluated while training", 32)
    eval_anchors: int = flag("blocks per text in these evaluations", 64)

    # Defaults of ours where transformers' do not fit this task.
    learning_rate: float = flag("peak learning rate", 1e-3)
    lr_scheduler_type: str = flag("as in transformers", "cosine")
    per_device_train_batch_size: int = flag("texts per step and device", 4)
    per_device_eval_batch_size: int = flag("texts per evaluation step", 4)
    logging_steps: float = flag("steps between two lines of the log", 10)
    report_to: list[str] = flag("where the log goes too", ["tensorboard"])
    seed: int = flag("seed of start values, and of what is drawn while training", 42)
    remove_unused_columns: bool = flag("as in transformers", False)
    save_total_limit: int | None = flag("checkpoints to keep", 2)
    gradient_checkpointing: bool = flag(
        "keep only the layers' inputs for the backward, and compute the rest anew", True
    )

    def __post_init__(self) -> None:
        if isinstance(self.data, str):  # in Python, or in JSON
            self.data = [self.data]
        self.require_valid(self.num_speculative_tokens)
        every = [*self.stages, self.layers]
        require_used(self, every, self.num_speculative_tokens)
        refuse_inherited(self)
        for require in REQUIREMENTS:
            require(self)
        keeps_the_best = self.load_best_model_at_end or self.save_strategy == "best"
        if keeps_the_best and self.metric_for_best_model is None:
            # transformers' own default is a loss, which our evaluation has not.
            self.metric_for_best_model = METRICS[0]
        # transformers wants to be told, or it refuses bf16 where there is no GPU.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        try:
            super().__post_init__()
            require_decay(self)
            try_loop(self)
        except MTPError:
            raise
        except Exception as error:  # of transformers, accelerate, torch, loggers ...
            said = " ".join(str(error).split()) or type(error).__name__
            raise MTPError(f"refused by transformers: {said}") from error
        self._require_tensorboard()
        self._require_flex()
        self._require_gpus_to_divide_over()
        self._stay_on_one_gpu()

    def _require_tensorboard(self) -> None:
        # transformers would only say so once the target is loaded.
        if "tensorboard" in self.report_to and not is_tensorboard_available():
            raise MTPError(
                "report_to: got 'tensorboard', which needs the package tensorboard: "
                "pip install 'vllm-mtp[train]', or write report_to: none"
            )

    def _require_gpus_to_divide_over(self) -> None:
        if self.target_device_map == "one":
            return
        got = f"target_device_map: got {self.target_device_map!r}"
        if self.world_size > 1:
            raise MTPError(
                f"{got} with {self.world_size} processes, each of which would take all "
                "GPUs for its target; start one process, or leave it out"
            )
        if self.device.type == "cpu":
            raise MTPError(
                f"{got}, but training is on the CPU; it divides a target over GPUs, so "
                "leave it out"
            )

    def _require_flex(self) -> None:
        if self.block_attention == "flex" and self.device.type != "cuda":
            raise MTPError(
                f"block_attention: got 'flex' on {self.device.type}, where torch's "
                "FlexAttention has no backward; expected slices, or an NVIDIA GPU"
            )

    def _stay_on_one_gpu(self) -> None:
        # Trainer would take nn.DataParallel, which cuts every tensor of a batch
        # along its first dimension: ours are texts, and it would cut their tokens.
        if self.n_gpu > 1 and self.target_device_map != "one":
            self._n_gpu = 1
        if self.n_gpu > 1:
            logger.warning(
                "train: using one of %d GPUs; start one process per GPU with "
                "`accelerate launch -m vllm_mtp.cli.main train ...` to use them all",
                self.n_gpu,
            )
            self._n_gpu = 1

    def plan(self) -> LossPlan:
        """What a step learns from texts."""
        return LossPlan(
            objective=Objective.of_settings(self),
            anchors_per_text=self.anchors_per_text,
            feature_weight=self.feature_weight,
            states_budget=self._states_budget(),
            states_folder=Path(self.states_folder) if self.states_folder else None,
            seed=self.seed,
            num_draft_tokens=self.train_places,
            schedule=Schedule(self.ce_start_steps, self.curriculum_steps),
            on_policy_weight=self.on_policy_weight,
            unvisited_weight=self.unvisited_weight,
        )

    def _states_budget(self) -> float:
        gigabytes = self.states_budget_gb
        if gigabytes is None:
            # A GPU computes them faster than it finds room for them.
            gigabytes = 4.0 if self.device.type == "cpu" else 0.0
        return gigabytes * 2**30

    def autocast(self) -> Any:
        """What a forward outside of Trainer's own loop has to run in."""
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)
