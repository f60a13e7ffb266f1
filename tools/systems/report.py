# SPDX-License-Identifier: Apache-2.0
"""docs/systems.md and its plots, from docs/systems.json alone."""

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tools.systems.presets import ROOT, Preset, presets
from tools.systems.reference import HELD_OUT_SET, UNSEEN_SET
from vllm_mtp.files import write_whole
from vllm_mtp.markdown import marked, table

PAGE = ROOT / "docs" / "systems.md"
DATA = ROOT / "docs" / "systems.json"
PLOT = ROOT / "docs" / "systems.png"
ARMS_PLOT = ROOT / "docs" / "systems-arms.png"
NOTHING: dict[str, Any] = {"runs": {}, "differences": []}
_TIMED = {"train": "Trained", "cost": "Drafts timed", "speed": "Speed measured"}
"""Parts of a run's results that depend on the CPU, in words. The last two also depend
on the target's type."""
_HEAD = (
    *("System", "Source", "AL k=1", "k=2", "k=3", "k=4", "By position"),
    *("AL, other kinds", "Trained", "Draft / step", "Predicted", "Measured"),
    *("Measured in", "Answers", "Minutes", "Labels"),
)


def write(results: Mapping[str, Any]) -> None:
    """The JSON, the page and the plots."""
    write_whole(DATA, json.dumps(results, indent=1) + "\n")
    write_whole(PAGE, renewed(PAGE.read_text("utf-8"), results))
    if points_of(results):
        plot_systems(results, PLOT)
    if curves_of(results):
        plot_arms(results, ARMS_PLOT)


def merged(before: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Results before, with runs of the same name renewed."""

    def key(found: Mapping[str, Any]) -> tuple[str, ...]:
        return found["set"], found["one"], found["other"], found["label"]

    by_key = {key(d): d for d in (*before["differences"], *new["differences"])}
    return {
        "runs": before["runs"] | new["runs"],
        "differences": [by_key[k] for k in sorted(by_key)],
    }


def renewed(text: str, results: Mapping[str, Any]) -> str:
    """The page with its tables made anew, between the text that is kept by hand."""
    runs = results["runs"]
    systems = [p for p in presets().values() if not p.is_arm]
    arms = [p for p in presets().values() if p.is_arm]
    plots = {
        "systems": _image("acceptance length over cost", PLOT, points_of(results)),
        "arms": _image("curves of the arms", ARMS_PLOT, curves_of(results)),
    }
    parts = {
        "systems": plots["systems"]
        + table(_HEAD, _lines(systems, runs))
        + _cpus([run for run in runs.values() if not presets()[run["preset"]].is_arm]),
        "commands": table(("System", "Command"), _commands(runs)),
        "arms": plots["arms"] + table(_HEAD, _lines(arms, runs)),
        "differences": _differences(results["differences"]),
    }
    for name, part in parts.items():
        text = marked(text, name, part)
    return text


def _image(text: str, file: Path, shown: Any) -> str:
    """Only what has something to show is plotted."""
    return f"![{text}]({file.name})\n\n" if shown else ""


def _cpus(runs: Iterable[Mapping[str, Any]]) -> str:
    """Which runs were made and timed where: a quarter of an hour differs by CPU."""
    names: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for part, words in _TIMED.items():
            if cpu := run.get("cpus", {}).get(part):
                dtype = run.get(part, {}).get("dtype")
                how = f"{words} in {dtype}" if dtype else words
                names.setdefault((how, cpu), []).append(run["preset"])
    said = [
        f"- {how} on {cpu}: {', '.join(sorted(n))}" for (how, cpu), n in names.items()
    ]
    return "\n\n" + "\n".join(sorted(said)) if said else ""


def _lines(
    wanted: Iterable[Preset], runs: Mapping[str, Mapping[str, Any]]
) -> list[list[str]]:
    """A line for every run of these presets, and for those without a run yet."""
    lines = []
    for preset in wanted:
        own = [run for run in runs.values() if run["preset"] == preset.name]
        lines += [_line(preset, run) for run in own] or [
            [preset.title, preset.link, *[""] * (len(_HEAD) - 2)]
        ]
    return lines


def _line(preset: Preset, run: Mapping[str, Any]) -> list[str]:
    simulated = run.get("offline", {})
    measured = run["served"]["sets"] if "served" in run else simulated
    held_out, others = measured.get(HELD_OUT_SET), measured.get(UNSEEN_SET)
    positions = held_out["acceptance_per_position"] if held_out else []
    lengths: list[float] = []
    if simulated:
        lengths += simulated[HELD_OUT_SET]["acceptance_length_by_k"][:-1]
    if held_out:
        lengths.append(held_out["acceptance_length"])
    cost, speed = run.get("cost"), run.get("speed")
    cells = [f"{length:.2f}" for length in lengths]
    return [
        preset.title + (f" ({run['label']})" if run["label"] else ""),
        preset.link,
        *(cells + [""] * 4)[:4],
        " ".join(f"{rate:.2f}" for rate in positions),
        f"{others['acceptance_length']:.2f}" if others else "",
        f"{run['trained_parameters'] / 1e6:.2f} M" if run["trained_parameters"] else "",
        f"{cost['draft']:.2f}" if cost else f"({run['draft_weights']:.2f})",
        f"{run['predicted']:.2f}" if run["predicted"] else "",
        f"{speed['ratio']['median']:.2f}" if speed else "",
        _where(run),
        _answers(run.get("served", {}).get("answers")),
        f"{run['minutes']:.0f}" if run["minutes"] else "",
        f"{run['labels'] / 1e3:,.0f} k",
    ]


def _where(run: Mapping[str, Any]) -> str:
    if "served" in run:
        return "vLLM"
    if "offline" not in run:
        return ""
    return "torch" if run["is_served"] else "torch (not served)"


def _answers(verdicts: Mapping[str, int] | None) -> str:
    if verdicts is None:
        return ""
    total, ties = sum(verdicts.values()), verdicts.get("tie", 0)
    text = f"{verdicts.get('equal', 0)} of {total} equal"
    return text + (f", {ties} float ties" if ties else "")


def _commands(runs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """What trains each run again."""
    lines = []
    for preset in presets().values():
        own = [run for run in runs.values() if run["preset"] == preset.name]
        # Runs of one preset differ by their seed, which is the user's to choose.
        overrides = next((run["overrides"] for run in own if run["overrides"]), {})
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in overrides.items()]
        command = ["vllm-mtp", "train", preset.command_file, *flags]
        lines.append([preset.title, f"`{shlex.join(command)}`"])
    return lines


def _differences(found: Iterable[Mapping[str, Any]]) -> str:
    titles = {name: preset.title for name, preset in presets().items()}
    rows = [
        [
            titles[each["one"]].removeprefix("Arm: "),
            titles[each["other"]].removeprefix("Arm: "),
            each["label"],
            each["set"],
            f"{each['estimate']:+.3f}",
            f"{each['low']:+.3f} to {each['high']:+.3f}",
            str(each["prompts"]),
        ]
        for each in found
    ]
    head = ("Arm", "less arm", "Run", "Set", "Difference of AL", "95 %", "Prompts")
    return table(head, rows)


def points_of(results: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Name, time of a draft in steps, and acceptance length of measured systems."""
    return [
        (
            run["preset"],
            run["cost"]["draft"],
            run["served"]["sets"][HELD_OUT_SET]["acceptance_length"],
        )
        for run in results["runs"].values()
        if "cost" in run and "served" in run and not presets()[run["preset"]].is_arm
    ]


def curves_of(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Runs of arms that were looked at more than once while they trained."""
    return [
        run
        for run in results["runs"].values()
        if presets()[run["preset"]].is_arm and len(run["curve"]) > 1
    ]


def plot_systems(results: Mapping[str, Any], path: Path) -> None:
    """Acceptance length over the measured cost of a draft."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    points = points_of(results)
    costs, lengths = [cost for _, cost, _ in points], [al for _, _, al in points]
    axes.scatter(costs, lengths, color="#4c72b0")
    for number, (name, cost, length) in enumerate(sorted(points, key=lambda p: p[2])):
        # Above and below by turns: many have nearly the same length.
        beside = (4, 4 if number % 2 else -10)
        axes.annotate(
            name, (cost, length), beside, textcoords="offset points", fontsize=8
        )
    ends = [0.0, max([1.0, *costs])]
    for gain in (1.0, 1.5, 2.0):
        axes.plot(ends, [gain * (1 + c) for c in ends], "k--", linewidth=0.6)
        # Where it begins: most end above what is shown.
        axes.annotate(
            f"AL / (1 + draft) = {gain}",
            (0, gain),
            (0, -12),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xlim(right=ends[1] * 1.15)
    axes.set_ylim(0.92, max([2.0, *lengths]) * 1.1)
    axes.set_xlabel("a draft's time over that of a step without, one request")
    axes.set_ylabel("acceptance length in vLLM, held-out prompts")
    figure.savefig(path, dpi=110)


def plot_arms(results: Mapping[str, Any], path: Path) -> None:
    """What each arm has learnt after so many labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    arms = [name for name, preset in presets().items() if preset.is_arm]
    for run in curves_of(results):
        labels, lengths = zip(*run["curve"], strict=True)
        title = presets()[run["preset"]].title.removeprefix("Arm: ")
        axes.plot(
            [count / 1e6 for count in labels],
            lengths,
            color=f"C{arms.index(run['preset'])}",
            label=f"{title} {run['label']}".strip(),
        )
    axes.set_xlabel("labels seen, millions")
    axes.set_ylabel("teacher-forced length, held-out text")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
