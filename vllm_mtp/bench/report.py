# SPDX-License-Identifier: Apache-2.0
"""A benchmark as JSON, as Markdown and as plots."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_mtp.bench import step_profile
from vllm_mtp.bench.cpu_settings import shown
from vllm_mtp.bench.loads import CONCURRENCY
from vllm_mtp.bench.plan import CONTROL, PLAIN, Plan
from vllm_mtp.bench.step_profile import StepProfile
from vllm_mtp.bench.summary import Line, Spread
from vllm_mtp.files import report_folder
from vllm_mtp.markdown import table

JSON_FILE = "benchmark.json"
TABLE_FILE = "benchmark.md"
PLOT_FILE = "speed.png"
_HEAD = (
    *("Load", "Side", "Tokens/s", "Ratio", "Verdict", "TTFT ratio", "TPOT ratio"),
    *("AL", "By position", "Drafted", "Same text", "Prefix hits"),
)
_NOTE = (
    f"Ratio: tokens/s over those of `{PLAIN}` in the same round; median (lowest to "
    f"highest). Verdict: `{CONTROL}` is a second server without speculation, so its "
    "ratios are what chance makes; a median below the lowest of them is slower than "
    "the control, one above the highest faster, and any other says nothing. TTFT "
    "ratio: time to the first token, likewise; below 1 is sooner. TPOT ratio: time per "
    "token after the first, likewise; below 1 is faster. AL: acceptance length, bonus "
    "token included, of the steps with a draft. Drafted: draft tokens that were "
    "verified, for each token of the answers. Same text: answers that are those of "
    f"`{PLAIN}`, as text; two tokens can tie in rounding. Prefix hits: prompt tokens "
    "found in the prefix cache, which is emptied before each measurement."
)
_PROFILE_NOTE = (
    "Milliseconds of decoding steps, V1 runner in one process, under torch's profiler, "
    "which makes them longer (last row). Every moment counts for the innermost scope; "
    "`scheduling, engine loop` is what the engine's step spends outside the runner. "
    "The draft is held against the other step under the profiler, the whole step "
    "without it: nothing is won below an acceptance length of that."
)


@dataclass(frozen=True)
class Stage:
    """A plan and what came of it."""

    title: str
    plan: Plan
    lines: list[Line]
    kv_blocks: dict[str, int]


@dataclass(frozen=True)
class Report:
    """A whole benchmark.

    Attributes:
        command: That repeats it.
        machine: What it ran on, by name.
        stages: In the order in which they ran.
        schedules: The calibrated number of tokens for each batch size, by drafter, if
            that was asked for.
        profiles: Where the time of a step goes, if that was asked for.
    """

    command: str
    machine: dict[str, str]
    stages: list[Stage]
    schedules: dict[str, list[tuple[int, int, int]]]
    profiles: list[StepProfile] = field(default_factory=list)


def write(report: Report, folder: Path) -> list[Path]:
    """Write ``benchmark.json``, ``benchmark.md`` and ``speed.png``.

    Raises:
        MTPError: The folder cannot be written.
    """
    files = [folder / name for name in (JSON_FILE, TABLE_FILE, PLOT_FILE)]
    with report_folder(folder):
        files[0].write_text(as_json(report), "utf-8")
        files[1].write_text(markdown(report), "utf-8")
        plot(report, files[2])
    return files


def as_json(report: Report) -> str:
    """Everything but prompts and answers."""
    content = asdict(report)
    for stage in content["stages"]:
        for load in stage["plan"]["loads"]:
            load["prompts"] = len(load["prompts"])
        stage["plan"]["target"] = Path(stage["plan"]["target"]).name
        stage["plan"]["environment"] = shown(stage["plan"]["environment"])
        for side in stage["plan"]["sides"]:
            config = side["speculative_config"] or {}
            if "model" in config:
                config["model"] = Path(str(config["model"])).name
    return json.dumps(content, indent=1) + "\n"


def markdown(report: Report) -> str:
    """A section for each stage."""
    parts = ["# Benchmark", f"    {report.command}"]
    parts.append("\n".join(f"- {key}: {text}" for key, text in report.machine.items()))
    for stage in report.stages:
        parts += [f"## {stage.title}", _settings(stage), *_tables(stage)]
    parts.append(_NOTE)
    if report.profiles:
        parts += ["## Where a step's time goes", step_profile.table(report.profiles)]
        parts.append(_PROFILE_NOTE)
    for name, schedule in report.schedules.items():
        setting = json.dumps([list(entry) for entry in schedule])
        parts.append(
            f"Calibrated for this machine, `{name}`: "
            f"`num_speculative_tokens_per_batch_size` = `{setting}`"
        )
    return "\n\n".join(parts) + "\n"


def _settings(stage: Stage) -> str:
    plan = stage.plan
    pools = sorted(set(stage.kv_blocks.values()))
    pool = f"{pools[0]} blocks on every side" if len(pools) == 1 else stage.kv_blocks
    sharing = any(side.per_request for side in plan.sides)
    shared = "Fixed numbers of tokens share a server: each request asks for its own. "
    return (
        f"Type {plan.dtype}, {'eager' if plan.enforce_eager else 'compiled'}, "
        f"{plan.rounds} round{'s' * (plan.rounds > 1)}"
        f"{', each with servers of its own' * plan.fresh_servers}. "
        f"{shared * sharing}KV pool: {pool}. "
        f"Answers of up to {max(load.output_tokens for load in plan.loads)} tokens to "
        f"{', '.join(str(len(load.prompts)) for load in plan.loads)} prompts."
    )


def _tables(stage: Stage) -> list[str]:
    """One for each thing that loads differ in."""
    kinds = dict.fromkeys(load.varies for load in stage.plan.loads)
    names = [{load.name for load in stage.plan.loads_of(kind)} for kind in kinds]
    return [
        table(_HEAD, [_row(line) for line in stage.lines if line.load in of])
        for of in names
    ]


def _row(line: Line) -> tuple[str, ...]:
    drafted = bool(line.counts.drafts)
    positions = " ".join(f"{rate:.2f}" for rate in line.counts.acceptance_per_position)
    return (
        line.load,
        line.side,
        f"{line.tokens_per_s.median:.1f}",
        spread_text(line.ratio),
        line.verdict or "",
        spread_text(line.ttft_ratio),
        spread_text(line.tpot_ratio) if line.tpot_ratio else "",
        f"{line.counts.acceptance_length:.2f}" if drafted else "",
        positions if drafted else "",
        f"{line.counts.draft_tokens / line.output_tokens:.2f}" if drafted else "",
        f"{line.same_texts}/{line.texts}",
        str(line.prefix_hits),
    )


def spread_text(value: Spread) -> str:
    """The median, and between what it lies."""
    return f"{value.median:.2f} ({value.low:.2f} to {value.high:.2f})"


def plot(report: Report, path: Path) -> None:
    """Tokens/s over those without speculation, by concurrency, a line per side.

    The control is grey.
    """
    # Not pyplot: it would choose a window system, and keep the figure for ever.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for stage in report.stages:
        loads = stage.plan.loads_of(CONCURRENCY)
        batches = {load.name: load.concurrency for load in loads}
        lines = [line for line in stage.lines if line.load in batches]
        for side in stage.plan.sides:
            mine = [line for line in lines if line.side == side.name]
            if side.name != PLAIN:
                color = "0.6" if side.name == CONTROL else None
                at = [batches[line.load] for line in mine]
                _draw(axes, side.name, at, mine, color)
    axes.axhline(1, color="k", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("requests at once")
    axes.set_ylabel("tokens/s, over those without speculation")
    axes.legend()
    figure.savefig(path, dpi=120)


def _draw(
    axes: Any, name: str, batches: list[int], lines: list[Line], color: str | None
) -> None:
    medians = [line.ratio.median for line in lines]
    below = [line.ratio.median - line.ratio.low for line in lines]
    above = [line.ratio.high - line.ratio.median for line in lines]
    _, known = axes.get_legend_handles_labels()
    label = "_" if name in known else name  # a later stage has a control as well
    style = {"marker": "o", "capsize": 3, "color": color}
    axes.errorbar(batches, medians, [below, above], label=label, **style)
