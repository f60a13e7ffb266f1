# SPDX-License-Identifier: Apache-2.0
"""Which settings of a training run are refused, and what to do about each."""

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from vllm_mtp.errors import MTPError

if TYPE_CHECKING:
    from vllm_mtp.training.arguments import DrafterTrainingArguments

# Metrics of our evaluation, the one to go by first.
METRICS = ("eval_teacher_forced_length", "eval_teacher_forced_position_1")
# As 0.1 called them: teacher-forced measures, named like those of decoding.
_FORMER_METRIC = re.compile(r"(eval_)?acceptance_(?P<rest>length|(place|position)_\d+)")


def require_decay(args: TrainingArguments) -> None:
    """Refuse a rate that would not fall in the run's end."""
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


def try_loop(args: TrainingArguments) -> None:
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


def _require_ranges(args: "DrafterTrainingArguments") -> None:
    for names, holds, expected in _RANGES:
        for name in names:
            if not holds(value := getattr(args, name)):
                raise MTPError(f"{name}: got {value!r}, expected {expected}")


def _require_names(args: "DrafterTrainingArguments") -> None:
    if not args.needs_data:
        if not args.target:
            raise MTPError("target: got nothing, expected a folder, or its config.json")
        return
    if not args.target or not args.data or not all(args.data):
        raise MTPError(
            f"target: got {args.target!r}, data: got {args.data!r}; both are "
            "needed (the target's folder, and the folder of its own answers)"
        )


def _require_stages(args: "DrafterTrainingArguments") -> None:
    if args.stages and args.stage_steps < 1:
        raise MTPError(
            f"stage_steps: got {args.stage_steps}, expected 1 or more where there are "
            "stages: the optimizer steps of each"
        )


def _require_start(args: "DrafterTrainingArguments") -> None:
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


def _require_positions(args: "DrafterTrainingArguments") -> None:
    if (args.train_places or 0) > args.num_speculative_tokens:
        raise MTPError(
            f"train_places: got {args.train_places}, but the drafter has "
            f"{args.num_speculative_tokens} (num_speculative_tokens); write that or"
            " less"
        )


def _require_schedule(args: "DrafterTrainingArguments") -> None:
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


def _require_the_text(args: "DrafterTrainingArguments") -> None:
    if args.acceptance_weight > 0 and args.on_policy_weight > 0:
        raise MTPError(
            f"acceptance_weight: got {args.acceptance_weight}, but on_policy_weight "
            f"is {args.on_policy_weight}, and of a span of the drafter's own nothing "
            "is accepted behind the first wrong token; leave one of the two out"
        )


def _require_average(args: "DrafterTrainingArguments") -> None:
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


def _require_own_layers(args: "DrafterTrainingArguments") -> None:
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


def _require_rows(args: "DrafterTrainingArguments") -> None:
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


def _require_one_mode(args: "DrafterTrainingArguments") -> None:
    optim = getattr(args.optim, "value", args.optim)
    # These have a mode for training and one for evaluation; Muon has none.
    if args.own_optimizer == "muon" and "schedule_free" in str(optim):
        raise MTPError(
            f"own_optimizer: got 'muon' and optim {optim}, which do not go together; "
            "write another optim, such as adamw_torch, or leave own_optimizer out"
        )


def _require_few_teacher_tokens(args: "DrafterTrainingArguments") -> None:
    if not (args.kl_weight > 0 or args.tv_weight > 0):
        return  # the default may be more than a small vocabulary has
    for name in ("draft_vocab_size", "loss_vocab_size"):
        size = getattr(args, name)
        if size is not None and args.teacher_tokens > size:
            raise MTPError(
                f"teacher_tokens: got {args.teacher_tokens}, but {name} has {size} "
                f"tokens scored; write {size} or less, or raise {name}"
            )


def _require_best(args: "DrafterTrainingArguments") -> None:
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
            f"evaluations measure no loss; expected one of {', '.join(METRICS)}"
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


# Before transformers looks at the settings.
REQUIREMENTS = (
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
