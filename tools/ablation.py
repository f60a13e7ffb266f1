#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Run the ablation's rows, one after the other, and write docs/ablation.md.

Rows that are finished are not run again, so a killed run goes on. Rows of the same
settings are run once. All rows read the same texts, so the target's states are
computed once and kept: about 25 kB per token of them for SmolLM2-135M in bfloat16.

    python tools/ablation.py --target TARGET --data DATA --out FOLDER

One row alone: `vllm-mtp train examples/ablation/base.yaml` with the row's flags.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import yaml

from tools.systems.train import flags_of
from vllm_mtp.cli.main import _load
from vllm_mtp.markdown import table
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.target_states import TargetStates
from vllm_mtp.training.run import TrainingRun, fit

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "ablation"
RESULTS = ROOT / "docs" / "ablation.json"
REPORT = ROOT / "docs" / "ablation.md"
PLOT = ROOT / "docs" / "ablation.png"
BASE = "examples/ablation/base.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", help="the target's folder")
    parser.add_argument("--data", help="folder of its answers")
    parser.add_argument("--out", type=Path, help="where the runs go")
    parser.add_argument(
        "--report-only", action="store_true", help="only write the report again"
    )
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    if not options.report_only:
        measure(results, options)
    write_report(results)
    return 0


def measure(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Train every row that has no result yet, and keep what was measured."""
    run: TrainingRun | None = None
    for row in all_rows():
        key = key_of(row["set"])
        if key in results:
            continue
        print(f"== {row['name']}", flush=True)
        args = arguments_of(row["set"], options, key)
        if run is None:
            run = TrainingRun(args, Path(options.target))
            keep_states(run.host)
        fit(run, args)
        results[key] = measured(Path(str(args.output_dir)))
        text = json.dumps(results, indent=1, sort_keys=True)
        RESULTS.write_text(text + "\n", "utf-8")


def keep_states(host: HFTarget) -> None:
    """Let the target run over each text once, however many rows read it."""
    encode, kept = host.encode, {}

    def remembered(
        token_ids: torch.Tensor,
        *,
        cached: Collection[int] | None = None,
        streams: Collection[int] = (),
    ) -> TargetStates:
        key = (token_ids.numpy().tobytes(), frozenset(streams))
        if key not in kept:
            # The layers that any row may ask for.
            kept[key] = encode(token_ids, streams=streams)
        return kept[key]

    host.encode = remembered  # type: ignore[method-assign]


def questions() -> list[dict[str, Any]]:
    return yaml.safe_load((FOLDER / "rows.yaml").read_text("utf-8"))


def all_rows() -> list[dict[str, Any]]:
    return [row for question in questions() for row in question["rows"]]


def key_of(changes: dict[str, Any]) -> str:
    """The same settings are the same run. The base is part of them."""
    base = yaml.safe_load((FOLDER / "base.yaml").read_text("utf-8"))
    text = json.dumps(base | changes, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def arguments_of(
    changes: dict[str, Any], options: argparse.Namespace, name: str
) -> Any:
    """The row as `vllm-mtp train` takes it."""
    flags = ["--target", options.target, "--data", options.data, *flags_of(changes)]
    out = ["--output_dir", str(options.out / name)]
    return _load("train", [str(ROOT / BASE), *flags, *out])


def measured(out: Path) -> dict[str, Any]:
    """What a finished run has logged."""
    state = json.loads((out / "trainer_state.json").read_text("utf-8"))
    logged = {k: v for line in state["log_history"] for k, v in line.items()}
    wanted = ("eval_teacher_forced", "trained_parameters", "draft_weights")
    return {k: v for k, v in logged.items() if k.startswith(wanted)}


def write_report(results: dict[str, Any]) -> None:
    """The tables and the plot."""
    text = REPORT.read_text("utf-8") if REPORT.exists() else "# Ablation\n"
    REPORT.write_text(renewed(text, results), "utf-8")
    plot(results)


def renewed(text: str, results: dict[str, Any]) -> str:
    """The page with its tables made anew, between the text that is kept by hand."""
    head = text.partition("<!-- tables -->")[0]
    tail = text.partition("<!-- end of tables -->")[2]
    body = "\n\n".join(table_of(question, results) for question in questions())
    return f"{head}<!-- tables -->\n\n{body}\n\n<!-- end of tables -->{tail}"


def table_of(question: dict[str, Any], results: dict[str, Any]) -> str:
    head = ("", "TFL", "position 1", "2", "3", "4")
    head += ("trained weights", "weights read", "flags")
    rows = []
    for row in question["rows"]:
        found = results.get(key_of(row["set"]))
        if found is None:
            continue
        positions = [found[f"eval_teacher_forced_position_{i}"] for i in range(1, 5)]
        numbers = [found["eval_teacher_forced_length"], *positions]
        flags = " ".join(flags_of(row["set"]))
        rows.append(
            [
                row["name"],
                *(f"{n:.3f}" for n in numbers),
                f"{found['trained_parameters'] / 1e6:.2f} M",
                f"{found['draft_weights']:.2f}",
                f"`{flags}`" if flags else "the base",
            ]
        )
    return f"## {question['question']}\n\n{table(head, rows)}"


def plot(results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    asked = questions()
    figure, axes = plt.subplots(len(asked), 1, figsize=(8, 1.3 * len(asked) + 6))
    for axis, question in zip(axes, asked, strict=True):
        rows = [r for r in question["rows"] if key_of(r["set"]) in results]
        names = [row["name"] for row in rows][::-1]
        lengths = [
            results[key_of(row["set"])]["eval_teacher_forced_length"] for row in rows
        ][::-1]
        axis.barh(names, [length - 1 for length in lengths], left=1, color="#4c72b0")
        axis.set_title(question["question"], loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
        for position, length in enumerate(lengths):
            axis.text(length, position, f" {length:.2f}", va="center", fontsize=8)
        axis.set_xlim(1, max([1.5, *lengths]) * 1.1)
    figure.supxlabel("teacher-forced length (bonus token included)", fontsize=9)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
