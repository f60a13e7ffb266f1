# SPDX-License-Identifier: Apache-2.0
"""Train systems, each for as many minutes of one core.

The learning rate falls to its end with the last step, so the number of steps must be
known before the first: a few steps are timed, and the budget divided by them.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tools.command import alone
from tools.systems.presets import Preset
from tools.systems.runs import Run, Trained
from vllm_mtp.cli.main import _load
from vllm_mtp.cli.targets import target_folder
from vllm_mtp.errors import MTPError
from vllm_mtp.training.run import TrainingRun

_TIMED_STEPS = 6
_FIRST_STEPS = 2  # not counted: they set up what later ones have


@dataclass(frozen=True)
class Budget:
    """How long a run may train.

    Attributes:
        steps: Optimizer steps.
        seconds_per_step: CPU time of one, as it was timed.
    """

    steps: int
    seconds_per_step: float

    def overrides(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that a run of so many steps has otherwise than the file says.

        What the file counts in steps keeps its place in a shorter run: a fifth at most
        for the warm-up, a third for the start of cross-entropy.
        """
        shorter = {"warmup_steps": 5, "ce_start_steps": 3}
        found: dict[str, Any] = {"max_steps": self.steps}
        for name, part in shorter.items():
            if (most := max(self.steps // part, 1)) < settings.get(name, 0):
                found[name] = most
        return found


def budget_of(minutes: float, seconds_per_step: float) -> Budget:
    """The steps that fit into some minutes; at least two, as a schedule has a slope."""
    steps = max(int(60 * minutes / seconds_per_step), 2)
    return Budget(steps, seconds_per_step)


class _Clock(TrainerCallback):
    """CPU seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self._began)


def seconds_per_step(file: str, given: Mapping[str, Any]) -> float:
    """CPU time of an optimizer step, the median of a few.

    Args:
        file: The settings.
        given: The target, the data and where states are.
    """
    with tempfile.TemporaryDirectory() as folder:
        timed = {
            "output_dir": folder,
            "max_steps": _TIMED_STEPS,
            "warmup_steps": 0,
            "ce_start_steps": 0,  # what comes behind takes longer, and most of the time
            "eval_strategy": "no",
            "eval_on_start": False,
            "save_strategy": "no",
        }
        args = _load("train", [file, *flags_of({**given, **timed})])
        run = TrainingRun(args, target_folder(given["target"]))
        trainer = run.trainer(run.new_drafter(args), args)
        clock = _Clock()
        trainer.add_callback(clock)
        trainer.train()
    return statistics.median(clock.seconds[_FIRST_STEPS:])


def train(
    preset: Preset,
    target: str,
    data: str,
    out: Path,
    minutes: float,
    steps: int | None,
    states: Path | None,
) -> None:
    """Train one system, or go on with it.

    Args:
        preset: The system.
        target: The target's folder.
        data: The folder of its answers.
        out: Folder of the runs.
        minutes: Of one core, spent on steps.
        steps: Optimizer steps in place of the minutes.
        states: Where the target's states of the texts are; None to compute them.

    Raises:
        MTPError: The run was begun with another budget.
        subprocess.CalledProcessError: Training failed, and has said why.
    """
    run = Run(out / preset.name, preset)
    if run.is_trained:
        print(f"{run.name}: is trained", flush=True)
        return
    out.mkdir(parents=True, exist_ok=True)
    known = run.results().get("train")
    asked = {"steps": steps} if steps else {"minutes": minutes}
    given: dict[str, Any] = {"target": target, "data": data}
    if states is not None:
        given["states_folder"] = str(states)
    if known is None:
        took = alone(seconds_per_step, str(preset.file), given)
        budget = Budget(steps, took) if steps else budget_of(minutes, took)
        changed = budget.overrides(preset.settings())
        known = {
            "asked": asked,
            "seconds_per_step": budget.seconds_per_step,
            "overrides": changed,
            "cpu_seconds": 0.0,
        }
        run.keep("train", known)
    if known["asked"] != asked:
        raise MTPError(
            f"{run.folder}: was begun with {known['asked']}, got {asked}; its learning "
            "rate falls to its end there. Go on with that, or remove the folder and "
            f"{run.name}.json"
        )
    # Evaluations on the way are for the curves of long runs.
    flags = given | {
        "output_dir": str(run.folder),
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_steps": 25,
        "resume_from_checkpoint": "last",
        **known["overrides"],
    }
    print(f"{run.name}: {known['overrides']['max_steps']} steps", flush=True)
    go_on(run, preset.file, known, flags)


def use_large_pages() -> None:
    """In all processes from here on that train: a quarter less time
    (docs/training.md)."""
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


def go_on(
    run: Trained, file: Path, known: Mapping[str, Any], flags: Mapping[str, Any]
) -> None:
    """Train by `vllm-mtp train`, and add up the CPU time.

    Args:
        run: Its results get ``train``.
        file: The settings.
        known: ``train`` before, ``cpu_seconds`` among it.
        flags: Settings in place of the file's.

    Raises:
        subprocess.CalledProcessError: Training failed, and has said why.
    """
    before = _cpu_seconds_of_children()
    command = [sys.executable, "-m", "vllm_mtp.cli.main", "train", str(file)]
    try:
        subprocess.run([*command, *flags_of(flags)], check=True)
    finally:
        spent = _cpu_seconds_of_children() - before
        run.keep("train", {**known, "cpu_seconds": known["cpu_seconds"] + spent})


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as `vllm-mtp train` takes them."""
    flags: list[str] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            value = json.dumps(value)
        values = value if isinstance(value, list) else [value]
        # argparse cannot say "nothing"; 0 means the same for a rank.
        flags += [f"--{name}", *("0" if each is None else str(each) for each in values)]
    return flags


def _cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
