# SPDX-License-Identifier: Apache-2.0
"""What a training run will take, and what to change where it does not fit."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_mtp.data.store import read_split
from vllm_mtp.errors import MTPError
from vllm_mtp.torch_host.without_weights import BareTarget
from vllm_mtp.training.arguments import DrafterTrainingArguments
from vllm_mtp.training.step_memory import step_memory, uncounted
from vllm_mtp.training.step_shape import StepShape, step_shape
from vllm_mtp.training.step_time import (
    Device,
    decoded_tokens_per_second,
    encode_flops,
    learn_flops,
)

GIB = 2**30
# Assumed, not measured: what the driver and torch's libraries take, what kernels need
# beside their tensors, and holes between tensors.
RESERVE = 2.0 * GIB
_ID_BYTES = 4  # of a token of a data set on disk


@dataclass(frozen=True)
class Texts:
    """The data of a run.

    Attributes:
        number: Texts to train on.
        prompt_tokens: Of a text, on average.
        answer_tokens: Likewise.
        has_answers: Whether they are there already.
    """

    number: int
    prompt_tokens: float
    answer_tokens: float
    has_answers: bool = False

    @property
    def tokens(self) -> float:
        """Of a text, on average."""
        return self.prompt_tokens + self.answer_tokens


@dataclass(frozen=True)
class Change:
    """One setting that is changed so that a step fits.

    Attributes:
        settings: Their names, with what they were and what they become.
        peak: Bytes of a step then.
        cost: What is given up.
    """

    settings: dict[str, tuple[Any, Any]]
    peak: int
    cost: str


@dataclass(frozen=True)
class Faster:
    """A run that keeps the layers' activations, in place of computing them anew.

    Attributes:
        peak: Bytes of its steps; they fit.
        hours: Of its training.
    """

    peak: int
    hours: float


@dataclass(frozen=True)
class Plan:
    """What a run takes on one kind of device.

    Attributes:
        shape: Sizes of its steps; of stages, of the one that takes most.
        memory: Bytes of a step by item, at its peak.
        capacity: Bytes of a device that a step may take.
        changes: What to change, one after the other, where it does not fit; empty
            where it does.
        faster: What `gradient_checkpointing: false` gives, where that fits too.
        seconds_per_step: Of one optimizer step, of the last stage.
        tokens_per_second: Of text, by all devices.
        steps: Optimizer steps of the run.
        hours: Of training.
        generation_hours: Of the answers; 0 where they are there.
        disk: Bytes by item.
    """

    shape: StepShape
    memory: dict[str, int]
    capacity: float
    changes: tuple[Change, ...]
    faster: Faster | None
    seconds_per_step: float
    tokens_per_second: float
    steps: int
    hours: float
    generation_hours: float
    disk: dict[str, float]

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity

    @property
    def changed(self) -> DrafterTrainingArguments:
        """The settings with all changes."""
        settings: dict[str, Any] = {}
        for change in self.changes:
            settings |= {name: after for name, (_, after) in change.settings.items()}
        return replace(self.shape.args, **settings)

    @property
    def fits_after_changes(self) -> bool:
        """Whether it fits as it is, or with all changes."""
        return self.fits or (
            bool(self.changes) and self.changes[-1].peak <= self.capacity
        )


def make_plan(
    target: BareTarget,
    args: DrafterTrainingArguments,
    device: Device,
    num_devices: int,
    texts: Texts,
    generated_at_once: int,
) -> Plan:
    """Plan a run.

    Args:
        target: The target.
        args: The settings.
        device: On which it runs.
        num_devices: How many of them.
        texts: The data.
        generated_at_once: Prompts that a device answers at once, at most.

    Raises:
        MTPError: The target or the settings do not go, or there is no formula for such
            a drafter.
    """
    shapes = [
        step_shape(target, replace(args, layers=layers))
        for layers in (*args.stages, args.layers)
    ]
    for shape in shapes:
        if keys := uncounted(shape.config):
            raise MTPError(
                f"plan: there is no formula for {', '.join(keys[:3])}"
                + f" and {len(keys) - 3} more" * (len(keys) > 3)
                + " of this drafter; use --trace, which runs a step without numbers"
            )
    # The largest of its stages is what has to fit.
    shape = max(shapes, key=lambda s: sum(step_memory(s, num_devices).values()))
    memory = step_memory(shape, num_devices)
    capacity = device.memory - RESERVE
    fits = sum(memory.values()) <= capacity
    changes = () if fits else _changes(target, shape, num_devices, capacity)
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    together = per_step * num_devices
    last = (
        args.max_steps
        if args.max_steps > 0
        else -(-round(texts.number * args.num_train_epochs) // together)
    )
    steps = [args.stage_steps] * len(args.stages) + [last]
    means = [s.of_text(texts.tokens, texts.answer_tokens) for s in shapes]

    def hours_of(run: Sequence[StepShape]) -> float:
        each = [_flops(mean) / device.flops * per_step for mean in run]
        return sum(map(operator.mul, steps, each)) / 3600

    seconds = _flops(means[-1]) / device.flops
    peak = sum(step_memory(_keeping(shape), num_devices).values())
    faster = None
    if args.gradient_checkpointing and fits and peak <= capacity:
        faster = Faster(peak, hours_of([_keeping(mean) for mean in means]))
    context = texts.prompt_tokens + texts.answer_tokens / 2
    speed = decoded_tokens_per_second(shape.target, device, context, generated_at_once)
    answers = 0.0 if texts.has_answers else texts.number * texts.answer_tokens
    return Plan(
        shape=shape,
        memory=memory,
        capacity=capacity,
        changes=changes,
        faster=faster,
        seconds_per_step=seconds * per_step,
        tokens_per_second=num_devices * means[-1].tokens / seconds,
        steps=sum(steps),
        hours=hours_of(means),
        generation_hours=answers / (speed * num_devices) / 3600,
        disk=_disk(shape, texts),
    )


def _flops(shape: StepShape) -> float:
    """Operations of one text."""
    return encode_flops(shape.target, shape.tokens) + learn_flops(shape)


def _keeping(shape: StepShape) -> StepShape:
    """The same with the layers' activations kept."""
    return replace(shape, args=replace(shape.args, gradient_checkpointing=False))


def _disk(shape: StepShape, texts: Texts) -> dict[str, float]:
    """Bytes by item."""
    args, drafter = shape.args, shape.drafter_parameters
    kept = (args.save_total_limit or 1) + 1  # the newest is whole before one goes
    averages = args.ema_decay is not None
    checkpoint = 4 * drafter * (1 + averages) + shape.optimizer_bytes
    return {
        "target": 2.0 * shape.target.parameters,
        "texts": float(texts.number * texts.tokens * _ID_BYTES),
        f"checkpoints ({kept})": float(kept * checkpoint),
        "drafter": float(drafter * (4 if shape.config.dtype == "float32" else 2)),
    }


_Step = Callable[[DrafterTrainingArguments], dict[str, Any]]
"""From the settings to those that shall be others; empty where there is nothing to."""


def _no_states_kept(args: DrafterTrainingArguments) -> dict[str, Any]:
    return {"states_budget_gb": 0.0} if args.states_budget_gb else {}


def _half_batch(args: DrafterTrainingArguments) -> dict[str, Any]:
    texts = args.per_device_train_batch_size
    if texts == 1:
        return {}
    times = args.gradient_accumulation_steps
    return {
        "per_device_train_batch_size": texts // 2,
        "gradient_accumulation_steps": -(-times * texts // (texts // 2)),
    }


def _halved(name: str, least: int) -> _Step:
    def halved(args: DrafterTrainingArguments) -> dict[str, Any]:
        value = getattr(args, name)
        return {name: max(value // 2, least)} if value > least else {}

    return halved


def _fewer_scored(args: DrafterTrainingArguments) -> dict[str, Any]:
    some = args.loss_vocab_size or args.draft_vocab_size
    return {} if some else {"loss_vocab_size": 32768}


def _half_rank(args: DrafterTrainingArguments) -> dict[str, Any]:
    if (rank := args.lora_rank or 0) <= 16 or args.warm_start:
        return {}
    half: dict[str, Any] = {"lora_rank": rank // 2}
    if args.lora_alpha:
        half["lora_alpha"] = args.lora_alpha / 2  # the same scale
    return half


def _half_own_layers(args: DrafterTrainingArguments) -> dict[str, Any]:
    kind, _, numbers = args.layers.partition("own:")
    layers = numbers.split(",")
    alone = not kind and all(number.isdecimal() for number in layers)
    if not alone or len(layers) < 2 or args.stages or args.warm_start:
        return {}
    return {"layers": "own:" + ",".join(layers[::-1][::2][::-1])}  # the last one stays


def _lora_alone(args: DrafterTrainingArguments) -> dict[str, Any]:
    if "own" not in args.layers or args.stages or args.warm_start:
        return {}
    return {
        "layers": "shared:all",
        "lora_rank": 32,
        "bridges": False,
        "boundary_hidden": "none",
        "own_optimizer": "as_optim",
        "feature_weight": 0.0,
    }


def _changed(name: str, value: Any) -> _Step:
    return lambda args: {} if getattr(args, name) == value else {name: value}


# What is given up, from nothing to much, and how.
_REMEDIES: tuple[tuple[str, _Step], ...] = (
    ("range of numbers that nobody misses", _changed("bf16", True)),
    ("time, where texts come again", _no_states_kept),
    ("a little time", _half_batch),
    ("the drafter's forward once more", _changed("gradient_checkpointing", True)),
    ("labels per text", _halved("anchors_per_text", 128)),
    ("the ends of long texts", _halved("max_text_tokens", 2048)),
    ("room to learn", _half_rank),
    ("an approximation of the loss", _fewer_scored),
    ("labels per text", _halved("anchors_per_text", 32)),
    ("the ends of long texts", _halved("max_text_tokens", 512)),
    ("accepted tokens", _half_own_layers),
    ("speed: such a draft costs as much as a step of the target", _lora_alone),
)
_HELPS = 0.99  # what makes less of a difference is no advice


def _changes(
    target: BareTarget, shape: StepShape, num_devices: int, capacity: float
) -> tuple[Change, ...]:
    """Settings that are changed one after the other until a step fits, or nothing is
    left to change. What is not needed in the end is not changed."""

    known = [shape]

    def peak_of(settings: DrafterTrainingArguments) -> int:
        known.append(step_shape(target, settings, known))
        return sum(step_memory(known[-1], num_devices).values())

    def replayed(chosen: Sequence[tuple[str, _Step]]) -> tuple[Change, ...]:
        now, changes = shape.args, []
        for cost, step in chosen:
            before, now = now, replace(now, **step(now))
            changed = {
                name: (getattr(before, name), value)
                for name, value in step(before).items()
                if getattr(before, name) != value
            }
            changes.append(Change(changed, peak_of(now), cost))
        return tuple(changes)

    now, peak = shape.args, peak_of(shape.args)
    chosen: list[tuple[str, _Step]] = []
    for cost, step in _REMEDIES:
        while peak > capacity and (settings := step(now)):
            changed = replace(now, **settings)
            if (smaller := peak_of(changed)) > _HELPS * peak:
                break
            now, peak = changed, smaller
            chosen.append((cost, step))
    if peak <= capacity:
        # What costs more comes later, and may have made something before it needless.
        for index in reversed(range(len(chosen) - 1)):
            fewer = [*chosen[:index], *chosen[index + 1 :]]
            if replayed(fewer)[-1].peak <= capacity:
                chosen = fewer
    return replayed(chosen)


def texts_of_folders(folders: Sequence[str | Path]) -> Texts:
    """The data of folders that `vllm-mtp generate` has finished.

    Raises:
        DataError: One is none.
    """
    number = tokens = answers = 0
    for folder in folders:
        rows = read_split(folder, "train")
        number += len(rows)
        tokens += sum(map(len, rows["input_ids"]))
        answers += sum(
            end - start for spans in rows["loss_spans"] for start, end in spans
        )
    prompt, answer = (tokens - answers) / number, answers / number
    return Texts(number, prompt, answer, has_answers=True)
