# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp plan``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_mtp.errors import MTPError, in_one_line
from vllm_mtp.flags import flag
from vllm_mtp.training.arguments import DrafterTrainingArguments

if TYPE_CHECKING:
    from vllm_mtp.drafter.config import DrafterConfig
    from vllm_mtp.torch_host.without_weights import BareTarget
    from vllm_mtp.training.fake_step import StepTrace
    from vllm_mtp.training.plan import Change, Plan, Texts

_GIB = 2**30


@dataclass(kw_only=True)
class PlanCommand(DrafterTrainingArguments):
    """Say what a training run takes, before there is a GPU, weights or data:
    `vllm-mtp plan SETTINGS.yaml --target FOLDER_OR_CONFIG --device-memory 80`. Takes
    the settings of `train` (flags win). Memory is that of the longest texts; times
    follow from the devices' stated speed. Where a step does not fit, it says which
    settings make it fit. Exit code 1 where nothing does."""

    takes_yaml: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False
    usage: ClassVar[str] = "%(prog)s [SETTINGS.yaml] [--flags ...]  (--help: which)"

    device_memory: float = flag("of a device, in GiB", 80.0)
    num_devices: int = flag("devices, each with a copy of target and drafter", 1)
    device_tflops: float = flag(
        "a device's dense products in bfloat16, in 10^12 per second (default: H100 "
        "SXM, by NVIDIA's data sheet)",
        989.0,
    )
    utilisation: float = flag(
        "the part of it that training reaches (Llama 3 was trained at 0.38 to 0.43, "
        "arXiv 2407.21783; blocks attend in plain torch here)",
        0.3,
    )
    device_bandwidth: float = flag(
        "a device's memory, in 10^9 bytes per second (default: H100 SXM, likewise); "
        "only the answers' time follows from it",
        3350.0,
    )
    num_texts: int = flag("texts to train on, where there is no --data", 100_000)
    mean_prompt_tokens: float = flag("of a text, on average, likewise", 256.0)
    mean_answer_tokens: float = flag("of a text, on average, likewise", 768.0)
    generated_at_once: int = flag("prompts that a device answers at once, at most", 256)
    trace: bool = flag(
        "also run the real step with tensors without storage and show what it keeps "
        "(half a minute to some minutes)",
        False,
    )
    json: bool = flag("print JSON", False)

    def __post_init__(self) -> None:
        self._require_numbers()
        if self.target_device_map != "one":
            raise MTPError(
                f"target_device_map: got {self.target_device_map!r}, but a plan is of "
                "a target that is on one device; leave it out"
            )
        if self.on_policy_weight and not self.trace:
            raise MTPError(
                f"on_policy_weight: got {self.on_policy_weight}, which the formula of "
                "a step's memory leaves out; add --trace, which runs the step, or "
                "leave it out"
            )
        super().__post_init__()

    def _require_numbers(self) -> None:
        for name in (
            *("device_memory", "num_devices", "device_tflops", "utilisation"),
            *("device_bandwidth", "num_texts", "mean_answer_tokens"),
            "generated_at_once",
        ):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise MTPError(f"{name}: got {value!r}, expected a number above 0")
        if not 0 <= self.mean_prompt_tokens < float("inf"):
            raise MTPError(
                f"mean_prompt_tokens: got {self.mean_prompt_tokens!r}, expected 0 or "
                "a number above"
            )
        if self.utilisation > 1:
            raise MTPError(
                f"utilisation: got {self.utilisation!r}, expected a part, at most 1"
            )

    def run(self) -> int:
        from vllm_mtp.torch_host.without_weights import drafter_config
        from vllm_mtp.training.fake_step import fake_step
        from vllm_mtp.training.plan import RESERVE, make_plan
        from vllm_mtp.training.step_memory import uncounted
        from vllm_mtp.training.step_time import Device

        target = bare_target(self.target)
        device = Device(
            self.device_tflops,
            self.utilisation,
            self.device_bandwidth,
            self.device_memory * _GIB,
        )
        texts = self._texts()
        config = drafter_config(target, self.layers, self.num_speculative_tokens, self)
        if self.trace and uncounted(config):
            traced = fake_step(target, self)
            return self._show(config, traced, device.memory - RESERVE)
        plan = make_plan(
            target, self, device, self.num_devices, texts, self.generated_at_once
        )
        step = fake_step(target, self) if self.trace else None
        if self.json:
            print(json.dumps(as_json(plan, step), indent=2))
        else:
            print(as_text(plan, self, texts, step))
        return 0 if plan.fits_after_changes else 1

    def _show(
        self, config: "DrafterConfig", traced: "StepTrace", capacity: float
    ) -> int:
        """Show the memory of a step for which there is no formula."""
        fits = traced.total <= capacity
        if self.json:
            memory = _traced_json(traced)
            print(json.dumps({"traced": memory, "fits": fits}, indent=2))
        else:
            verdict = "A step fits" if fits else "A step does not fit"
            print(
                f"{_traced_text(traced)}\n\n{verdict}: {_gib(capacity)} GiB are free."
                "\nThere is no formula for such a drafter, so times, and changes that "
                "would make it fit,\nare not known."
                + "".join(f"\n{line}" for line in _unserved_lines(config))
            )
        return 0 if fits else 1

    def _texts(self) -> "Texts":
        from vllm_mtp.training.plan import Texts, texts_of_folders

        if self.data:
            texts = texts_of_folders(self.data)
        else:
            texts = Texts(
                self.num_texts, self.mean_prompt_tokens, self.mean_answer_tokens
            )
        number = min(texts.number, self.train_texts or texts.number)
        return Texts(
            number, texts.prompt_tokens, texts.answer_tokens, texts.has_answers
        )


def bare_target(target: str) -> "BareTarget":
    """A target by a folder, by a file that is its config, or by a hub name.

    Raises:
        MTPError: There is none.
    """
    from transformers import AutoConfig

    from vllm_mtp.drafter.target_facts import hf_config_of
    from vllm_mtp.torch_host.without_weights import BareTarget

    path = Path(target).expanduser()
    if path.is_dir():
        return BareTarget(hf_config_of(path))
    try:
        # Of a hub name only this file is fetched.
        config = AutoConfig.from_pretrained(path if path.is_file() else target)
    except Exception as error:  # of the hub's client, of the config's class ...
        raise MTPError(
            f"--target {target!r}: expected a Hugging Face folder, its config.json or "
            f"a hub name ({in_one_line(error, 200)})"
        ) from None
    return BareTarget(config)


def as_text(
    plan: "Plan",
    args: PlanCommand,
    texts: "Texts",
    traced: "StepTrace | None" = None,
) -> str:
    """A plan to be read.

    Args:
        plan: What to show.
        args: What it is of.
        texts: Its data.
        traced: The real step's memory, if it was run.
    """
    from vllm_mtp.markdown import aligned

    shape, facts = plan.shape, plan.shape.config.target
    rows = shape.texts * shape.blocks * shape.positions
    where = "is there" if texts.has_answers else "assumed"
    parts = [
        (
            f"target   {facts.model_type}, {shape.target.parameters / 1e9:.2f} G "
            f"parameters, {facts.num_hidden_layers} layers, hidden "
            f"{facts.hidden_size}, vocabulary {facts.vocab_size}"
        ),
        (
            f"drafter  {shape.args.layers}, {shape.trained_parameters / 1e9:.3f} G "
            "parameters trained"
        ),
        (
            f"a step   {shape.texts} texts of {shape.tokens} tokens at most, "
            f"{shape.blocks} blocks behind each, {rows} labels"
        ),
        (
            f"data     {texts.number} texts of {texts.prompt_tokens:.0f} + "
            f"{texts.answer_tokens:.0f} tokens ({where}), {plan.steps} steps"
        ),
        *_unserved_lines(shape.config),
        "",
        aligned(
            ("Memory of a step", "GiB"),
            [
                *((name, _gib(size)) for name, size in plan.memory.items()),
                (f"peak, of {_gib(plan.capacity)} that are free", _gib(plan.peak)),
            ],
        ),
        "",
    ]
    if traced is not None:
        parts += [_traced_text(traced), ""]
    if shape.args.on_policy_weight:
        parts += [
            "The formula leaves on_policy_weight out; the traced step has it.",
            "",
        ]
    parts += [*_verdict(plan), ""]
    head = f"Time, {args.num_devices} x {args.device_tflops:.0f} TFLOPS"
    parts += [
        aligned(
            (f"{head} x {args.utilisation:.2f}", ""),
            [
                ("an optimizer step, seconds", f"{plan.seconds_per_step:.2f}"),
                ("tokens of text per second", f"{plan.tokens_per_second:,.0f}"),
                ("training, hours", _hours(plan.hours)),
                ("answers before it, hours", _hours(plan.generation_hours)),
            ],
        ),
        "",
        aligned(
            ("Disk", "GB"),
            [(name, f"{size / 1e9:.1f}") for name, size in plan.disk.items()],
        ),
    ]
    return "\n".join(parts)


def _unserved_lines(config: "DrafterConfig") -> list[str]:
    from vllm_mtp.drafter.served import unserved_text

    why = unserved_text(config)
    return [f"served   not by vLLM yet: {why}"] if why else []


def _traced_text(traced: "StepTrace") -> str:
    from vllm_mtp.markdown import aligned

    return aligned(
        ("The real step, traced", "GiB"),
        [
            *((name, _gib(size)) for name, size in traced.peak.items()),
            ("peak", _gib(traced.total)),
        ],
    )


def _traced_json(traced: "StepTrace") -> dict[str, int]:
    return {**traced.peak, "peak": traced.total}


def _verdict(plan: "Plan") -> list[str]:
    if plan.fits and plan.faster is None:
        return ["A step fits."]
    if (faster := plan.faster) is not None:
        took = f"{_gib(faster.peak)} GiB and {_hours(faster.hours)} hours of training"
        return [
            "A step fits, and with gradient_checkpointing: false too, which takes",
            f"{took} in place of {_hours(plan.hours)}.",
        ]
    if not plan.changes:
        return [
            "A step does not fit, and no setting changes that. More devices share the",
            "time, not the memory: each has a copy of target and drafter. A target",
            "that is too large for one can be divided (target_device_map), unplanned.",
        ]
    lines = ["A step does not fit. What makes it smaller, one after the other:"]
    lines += [f"  {change_text(change)}" for change in plan.changes]
    lines.append(
        "With these it fits."
        if plan.fits_after_changes
        else "It does not fit with all of these either: it takes a larger device."
    )
    return lines


def change_text(change: "Change") -> str:
    """A change in one line."""
    settings = ", ".join(
        f"{name}: {_value(after)} (was {_value(before)})"
        for name, (before, after) in change.settings.items()
    )
    return f"{settings}: {_gib(change.peak)} GiB; costs {change.cost}"


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return str(value)


def as_json(plan: "Plan", traced: "StepTrace | None" = None) -> dict[str, Any]:
    """A plan for programs; bytes and seconds, but for hours."""
    return {
        "memory": {**plan.memory, "peak": plan.peak, "free": plan.capacity},
        "traced": None if traced is None else _traced_json(traced),
        "fits": plan.fits,
        "fits_after_changes": plan.fits_after_changes,
        "changes": [
            {
                "settings": {n: after for n, (_, after) in change.settings.items()},
                "peak": change.peak,
                "costs": change.cost,
            }
            for change in plan.changes
        ],
        "without_gradient_checkpointing": (
            None
            if plan.faster is None
            else {"peak": plan.faster.peak, "hours": plan.faster.hours}
        ),
        "target_parameters": plan.shape.target.parameters,
        "trained_parameters": plan.shape.trained_parameters,
        "steps": plan.steps,
        "seconds_per_step": plan.seconds_per_step,
        "tokens_per_second": plan.tokens_per_second,
        "hours": plan.hours,
        "generation_hours": plan.generation_hours,
        "disk": plan.disk,
    }


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.1f}"
