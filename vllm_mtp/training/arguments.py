# SPDX-License-Identifier: Apache-2.0
"""Every setting of a training run, in one dataclass: flags and YAML keys alike."""

import logging
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import (
    get_reporting_integration_callbacks,
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
        for require in _REQUIREMENTS:
            require(self)
        keeps_the_best = self.load_best_model_at_end or self.save_strategy == "best"
        if keeps_the_best and self.metric_for_best_model is None:
            # transformers' own default is a loss, which our evaluation has not.
            self.metric_for_best_model = _METRICS[0]
        # transformers wants to be told, or it refuses bf16 where there is no GPU.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        try:
            super().__post_init__()
            _require_decay(self)
            _try_loop(self)
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


# Metrics of our evaluation, the one to go by first.
_METRICS = ("eval_teacher_forced_length", "eval_teacher_forced_position_1")
# As 0.1 called them: teacher-forced measures, named like those of decoding.
_FORMER_METRIC = re.compile(r"(eval_)?acceptance_(?P<rest>length|(place|position)_\d+)")


def _require_decay(args: TrainingArguments) -> None:
    # A flag of transformers', whose word for it is that of a function's argument.
    given: Any = args.lr_scheduler_kwargs or {}
    if args.lr_scheduler_type != "warmup_stable_decay":
        return
    if "num_decay_steps" not in given:
        raise MTPError(
            "lr_scheduler_type: got 'warmup_stable_decay', which has to know for how "
            "many steps the rate falls in the end; write lr_scheduler_kwargs: "
            "{num_decay_steps: 100}, or another number"
        )
    steps = given["num_decay_steps"]
    if not isinstance(steps, int) or steps < 1:
        raise MTPError(
            f"lr_scheduler_kwargs: got num_decay_steps {steps!r}, expected a whole "
            "number of steps, 1 or more"
        )
    if "num_stable_steps" in given:
        raise MTPError(
            "lr_scheduler_kwargs: got num_stable_steps, with which the rate would fall "
            "before the run's end or not at all; leave it out, it follows from the rest"
        )


def _try_loop(args: TrainingArguments) -> None:
    """Make what Trainer makes once the target is loaded: packages may be missing, and
    settings wrong.

    Raises:
        Exception: Of any kind.
    """
    weight = torch.nn.Parameter(torch.zeros(1, 1))
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = kind([weight], **settings)
    schedule: Any = args.lr_scheduler_kwargs
    get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(1000),
        num_training_steps=1000,
        scheduler_specific_kwargs=schedule,
    )
    others = [name for name in args.report_to or () if name != "tensorboard"]
    for callback in get_reporting_integration_callbacks(others):
        callback()


# Names, what holds for their values, and how to say that. NaN fails them all.
_RANGES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("learning_rate", "adam_epsilon"),
        lambda value: 0 < value < math.inf,
        "a number above 0",
    ),
    (
        ("weight_decay", "max_grad_norm", "eval_delay", "warmup_steps"),
        lambda value: 0 <= value < math.inf,
        "0 or a number above",
    ),
    (
        ("ce_weight", "kl_weight", "tv_weight", "acceptance_weight"),
        lambda value: 0 <= value < math.inf,
        "0 (none) or a number above",
    ),
    (
        ("on_policy_weight",),
        lambda value: 0 <= value <= 1,
        "a part from 0 (none) to 1 (all)",
    ),
    (
        ("unvisited_weight",),
        lambda value: 0 <= value <= 1,
        "a weight from 0 (such blocks teach nothing) to 1 (as much as others)",
    ),
    (
        ("ema_decay",),
        lambda value: value is None or 0 < value < 1,
        "a number above 0 and below 1, such as 0.999 (leave it out for no average)",
    ),
    (
        ("adam_beta1", "adam_beta2"),
        lambda value: 0 <= value < 1,
        "a number from 0 to below 1",
    ),
    (
        ("num_train_epochs",),
        lambda value: 0 < value < math.inf,
        "a number above 0",
    ),
    (
        ("max_steps",),
        lambda value: value == -1 or value >= 1,
        "1 or more (leave it out for num_train_epochs)",
    ),
    (
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ),
        lambda value: value >= 1,
        "1 or more",
    ),
    (
        ("logging_steps", "save_steps"),
        lambda value: 0 < value < math.inf,
        "a number above 0",
    ),
    (
        ("eval_steps", "save_total_limit", "torch_empty_cache_steps"),
        lambda value: value is None or 0 < value < math.inf,
        "a number above 0",
    ),
    (
        ("dataloader_num_workers",),
        lambda value: value >= 0,
        "0 (none) or more",
    ),
    (
        ("train_sampling_strategy",),
        lambda value: value in ("random", "sequential"),
        "random or sequential (texts are not padded, so they need no sorting)",
    ),
    (
        ("lr_scheduler_type",),
        lambda value: value not in ("reduce_lr_on_plateau", "greedy"),
        "a schedule that follows from the step alone, such as cosine",
    ),
    (
        ("anchors_per_text", "max_text_tokens"),
        lambda value: value >= 1,
        "1 or more",
    ),
    (
        ("eval_texts", "eval_anchors"),
        lambda value: value >= 1,
        "1 or more",
    ),
    (
        ("train_texts", "train_places", "loss_vocab_size"),
        lambda value: value is None or value >= 1,
        "1 or more (leave it out for all)",
    ),
    (
        ("feature_weight", "bridge_texts"),
        lambda value: value >= 0,
        "0 (none) or more",
    ),
    (
        ("states_budget_gb",),
        lambda value: value is None or value >= 0,
        "0 (none) or more (leave it out for what fits the device)",
    ),
    (
        ("teacher_tokens",),
        lambda value: value >= 0,
        "1 or more, or 0 for all tokens that are scored",
    ),
    (
        ("ce_start_steps", "curriculum_steps"),
        lambda value: value >= 0,
        "0 (none) or more optimizer steps",
    ),
    (
        ("placeholder_lr_scale", "markov_lr_scale"),
        lambda value: value > 0,
        "a number above 0 (1 for learning_rate itself)",
    ),
)


def _require_ranges(args: DrafterTrainingArguments) -> None:
    for names, holds, expected in _RANGES:
        for name in names:
            if not holds(value := getattr(args, name)):
                raise MTPError(f"{name}: got {value!r}, expected {expected}")


def _require_names(args: DrafterTrainingArguments) -> None:
    if not args.needs_data:
        if not args.target:
            raise MTPError("target: got nothing, expected a folder, or its config.json")
        return
    if not args.target or not args.data or not all(args.data):
        raise MTPError(
            f"target: got {args.target!r}, data: got {args.data!r}; both are "
            "needed (the target's folder, and the folder of its own answers)"
        )


def _require_stages(args: DrafterTrainingArguments) -> None:
    if args.stages and args.stage_steps < 1:
        raise MTPError(
            f"stage_steps: got {args.stage_steps}, expected 1 or more where there are "
            "stages: the optimizer steps of each"
        )


def _require_start(args: DrafterTrainingArguments) -> None:
    if args.train_only != "new_positions":
        return
    if args.stages:
        raise MTPError(
            f"train_only: new_positions does not go with stages (got {args.stages}), "
            "which train every layer; leave one of them out"
        )
    if args.curriculum_steps:
        raise MTPError(
            "train_only: new_positions does not go with curriculum_steps (got "
            f"{args.curriculum_steps}), which begins with two positions that are not "
            "new; leave one of them out"
        )
    if not args.warm_start:
        raise MTPError("train_only: new_positions needs warm_start, a trained drafter")
    if args.placeholder_kind == "noise":
        raise MTPError(
            "train_only: new_positions trains placeholders, and those of "
            "placeholder_kind noise are the target's embeddings; leave one of them out"
        )


def _require_positions(args: DrafterTrainingArguments) -> None:
    if (args.train_places or 0) > args.num_speculative_tokens:
        raise MTPError(
            f"train_places: got {args.train_places}, but the drafter has "
            f"{args.num_speculative_tokens} (num_speculative_tokens); write that or"
            " less"
        )


def _require_schedule(args: DrafterTrainingArguments) -> None:
    others = args.kl_weight, args.tv_weight, args.acceptance_weight
    if args.ce_start_steps and not any(weight > 0 for weight in others):
        raise MTPError(
            f"ce_start_steps: got {args.ce_start_steps}, but the loss is cross-entropy "
            "alone all the time; leave it out, or set tv_weight, kl_weight or "
            "acceptance_weight"
        )
    taught = args.train_places or args.num_speculative_tokens
    if args.curriculum_steps and taught <= 2:
        raise MTPError(
            f"curriculum_steps: got {args.curriculum_steps}, but only {taught} "
            "positions are taught, and it begins with two; leave it out, or raise "
            "num_speculative_tokens (or train_places)"
        )


def _require_the_text(args: DrafterTrainingArguments) -> None:
    if args.acceptance_weight > 0 and args.on_policy_weight > 0:
        raise MTPError(
            f"acceptance_weight: got {args.acceptance_weight}, but on_policy_weight "
            f"is {args.on_policy_weight}, and of a span of the drafter's own nothing "
            "is accepted behind the first wrong token; leave one of the two out"
        )


def _require_average(args: DrafterTrainingArguments) -> None:
    if args.ema_decay is None:
        return
    optim = str(getattr(args.optim, "value", args.optim))
    other = None
    if args.load_best_model_at_end:
        other = "load_best_model_at_end is true, which saves the weights of one step"
    elif "schedule_free" in optim:
        other = f"optim is {optim}, which averages the weights itself"
    if other:
        raise MTPError(
            f"ema_decay: got {args.ema_decay}, but {other}; leave one of the two out"
        )


def _require_own_layers(args: DrafterTrainingArguments) -> None:
    if args.own_optimizer != "as_optim" and args.per_position:
        raise MTPError(
            f"own_optimizer: got {args.own_optimizer!r}, which is for matrices, but "
            "per_position is true, so own layers have a stack of them in each tensor; "
            "leave one of the two out"
        )
    if all("own" in layers for layers in [*args.stages, args.layers]):
        return
    if args.feature_weight > 0:
        raise MTPError(
            f"feature_weight: got {args.feature_weight}, but the feature loss needs an "
            f"own layer, and the layers are {args.layers!r} (stages: {args.stages}); "
            "write 0, or add own layers"
        )
    if args.own_optimizer != "as_optim":
        raise MTPError(
            f"own_optimizer: got {args.own_optimizer!r}, but the layers are "
            f"{args.layers!r} (stages: {args.stages}), so there is no own layer to "
            "train; leave it out, or add own layers"
        )


def _require_rows(args: DrafterTrainingArguments) -> None:
    """Refuse what is made for whole blocks, each row one position after the other."""
    for name, value, plain, asks in (
        ("chain", args.chain, False, "flex and features"),
        ("extra_rows", args.extra_rows, 0, "features"),
        ("block_mask", args.block_mask, "causal", "flex"),
    ):
        if value == plain:
            continue
        if args.block_attention == "flex" and "flex" in asks:
            raise MTPError(
                "block_attention: got 'flex', which is made for causal blocks that run "
                f"at once, but {name} is {value!r}; write slices"
            )
        if args.feature_weight > 0 and "features" in asks:
            raise MTPError(
                f"feature_weight: got {args.feature_weight}, but {name} is {value!r}, "
                "and only rows of a block at once, one for each position, are compared "
                "with the target's; write 0"
            )


def _require_one_mode(args: DrafterTrainingArguments) -> None:
    optim = getattr(args.optim, "value", args.optim)
    # These have a mode for training and one for evaluation; Muon has none.
    if args.own_optimizer == "muon" and "schedule_free" in str(optim):
        raise MTPError(
            f"own_optimizer: got 'muon' and optim {optim}, which do not go together; "
            "write another optim, such as adamw_torch, or leave own_optimizer out"
        )


def _require_few_teacher_tokens(args: DrafterTrainingArguments) -> None:
    if not (args.kl_weight > 0 or args.tv_weight > 0):
        return  # the default may be more than a small vocabulary has
    for name in ("draft_vocab_size", "loss_vocab_size"):
        size = getattr(args, name)
        if size is not None and args.teacher_tokens > size:
            raise MTPError(
                f"teacher_tokens: got {args.teacher_tokens}, but {name} has {size} "
                f"tokens scored; write {size} or less, or raise {name}"
            )


def _require_best(args: DrafterTrainingArguments) -> None:
    known = [
        "eval_teacher_forced_length",
        *(
            f"eval_teacher_forced_position_{number}"
            for number in range(1, args.num_speculative_tokens + 1)
        ),
    ]
    if args.metric_for_best_model in ("loss", "eval_loss"):
        raise MTPError(
            f"metric_for_best_model: got {args.metric_for_best_model!r}, but "
            f"evaluations measure no loss; expected one of {', '.join(_METRICS)}"
        )
    former = _FORMER_METRIC.fullmatch(args.metric_for_best_model or "")
    if former:
        now = "eval_teacher_forced_" + former["rest"].replace("place", "position")
        raise MTPError(
            f"metric_for_best_model: got {args.metric_for_best_model!r}, which is "
            f"named {now} now; write that"
        )
    name = args.metric_for_best_model or known[0]
    if name not in known and f"eval_{name}" not in known:
        raise MTPError(
            f"metric_for_best_model: got {name!r}, expected one of {', '.join(known)}"
        )
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise MTPError(
            "save_strategy: best needs evaluations while training, but eval_strategy "
            "is 'no'; write eval_strategy: steps (with eval_steps) or epoch"
        )


_REQUIREMENTS = (
    _require_names,
    _require_ranges,
    _require_stages,
    _require_start,
    _require_positions,
    _require_schedule,
    _require_the_text,
    _require_average,
    _require_own_layers,
    _require_rows,
    _require_one_mode,
    _require_few_teacher_tokens,
    _require_best,
)
