# SPDX-License-Identifier: Apache-2.0
"""Changes to the training of `cheap`, one at a time: what each gives, and how surely.

    python -m tools.experiments train    --target TARGET --data NAME=DATA .. --out RUNS
    python -m tools.experiments evaluate --target TARGET --data NAME=DATA .. --out RUNS
    python -m tools.experiments report   --out RUNS

The rows are in examples/experiments. Each goes on from the shipped drafter, with the
same steps, and decodes the same held-out prompts, so that differences are paired. Each
command goes on where it was left; ``--only NAME ...`` takes these rows alone.
``report`` adds to docs/experiments.json and writes docs/experiments.md; without
``--out`` from the JSON alone.

DATA is a folder of `vllm-mtp generate`, and NAME what rows call it: ``first`` (first
turns, which all but one row train on, and whose held-out prompts are decoded),
``later``, ``tasks``, ``self``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import tools.experiments
from tools.command import Parser, count, finish, require
from tools.systems.reference import SETS, reference
from tools.systems.runs import Trained, of_each, require_none
from vllm_mtp.errors import MTPError
from vllm_mtp.evaluation.paired import paired_difference
from vllm_mtp.files import write_whole
from vllm_mtp.installed import installed_folder
from vllm_mtp.markdown import marked, table
from vllm_mtp.metrics import AcceptanceCounts, mean_length

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "experiments"
BASE = FOLDER / "base.yaml"
PAGE = ROOT / "docs" / "experiments.md"
DATA = ROOT / "docs" / "experiments.json"
START = "cheap"
"""The installed drafter that all rows go on from."""
FIRST = "first"


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        name: Of its folder.
        asks: What it changes, in words.
        set: Settings in place of `BASE`'s; None for the drafter as it was before.
        data: Names of the folders of answers.
    """

    name: str
    asks: str
    set: Mapping[str, Any] | None
    data: tuple[str, ...] = (FIRST,)


@cache
def rows() -> dict[str, Row]:
    """All of them by name, the one first that others are compared with."""
    found = yaml.safe_load((FOLDER / "rows.yaml").read_text("utf-8"))
    made = (Row(**row | {"data": tuple(row.get("data", [FIRST]))}) for row in found)
    return {row.name: row for row in made}


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    options = _parser().parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return finish(
        f"experiments {options.command}",
        lambda: _run(options),
        "the same command goes on",
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tools.experiments",
        description=tools.experiments.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("train", "evaluate", "report"))
    parser.add_argument("--target", help="the target's folder")
    parser.add_argument("--data", nargs="+", help="NAME=FOLDER of answers")
    parser.add_argument("--states", type=Path, help="where the target's states are")
    parser.add_argument("--out", type=Path, help="where the runs are")
    parser.add_argument("--only", nargs="*", default=[], help="these rows")
    parser.add_argument(
        "--prompts", type=count, default=184, help="most of each set, to evaluate"
    )
    parser.add_argument(
        "--max-tokens", type=count, default=128, help="longest answer, to evaluate"
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    if unknown := sorted(set(options.only) - set(rows())):
        raise MTPError(f"--only {unknown[0]}: expected some of {', '.join(rows())}")
    chosen = [row for row in rows().values() if row.name in (options.only or rows())]
    if options.command == "report":
        report([] if options.out is None else _runs(options.out, chosen))
        return 0
    require(options, "target", "data", "out")
    folders = _folders(options.data)
    if options.command == "train":
        train(chosen, options.target, folders, options.out, options.states)
        return 0
    if FIRST not in folders:
        raise MTPError(f"--data: got no {FIRST}=FOLDER, whose prompts are decoded")
    runs = [run for run in _runs(options.out, chosen) if "offline" not in run.results()]
    if runs:
        evaluate(runs, options, folders[FIRST])
    return 0


def _folders(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for each in given:
        name, equals, folder = each.partition("=")
        if not (name and equals and folder):
            raise MTPError(f"--data: got {each!r}, expected NAME=FOLDER")
        found[name] = folder
    return found


def _runs(out: Path, chosen: Sequence[Row]) -> list[Trained]:
    """The finished runs of these rows."""
    runs = [run for row in chosen if (run := Trained(out / row.name)).is_trained]
    if not runs:
        raise MTPError(
            f"--out {out}: no trained run of these rows; `python -m tools.experiments "
            "train` makes them"
        )
    return runs


def train(
    chosen: Sequence[Row],
    target: str,
    folders: Mapping[str, str],
    out: Path,
    states: Path | None,
) -> None:
    """Train rows that are not trained, one behind the other.

    Args:
        chosen: The rows.
        target: The target's folder.
        folders: Of answers, by name.
        out: Folder of the runs.
        states: Where the target's states of the texts are; None to compute them.

    Raises:
        MTPError: Names the rows that failed or lack their data.
    """
    # Here, since it loads torch and more.
    from tools.systems.train import go_on, use_large_pages

    use_large_pages()
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for row in chosen:
        run = Trained(out / row.name)
        if run.is_trained:
            print(f"{row.name}: is trained", flush=True)
            continue
        if row.set is None:
            shutil.copytree(installed_folder(START), run.folder)
            run.keep("train", {"cpu_seconds": 0.0})
            continue
        if lacking := sorted(set(row.data) - set(folders)):
            print(f"{row.name}: --data has no {lacking[0]}=FOLDER", file=sys.stderr)
            failed.append(row.name)
            continue
        flags = {
            "target": target,
            "data": [folders[name] for name in row.data],
            "output_dir": str(run.folder),
            "warm_start": str(installed_folder(START)),
            "resume_from_checkpoint": "last",
            **({"states_folder": str(states)} if states else {}),
            **row.set,
        }
        print(f"{row.name}: {row.asks}", flush=True)
        try:
            go_on(run, BASE, run.results().get("train", {"cpu_seconds": 0.0}), flags)
        except subprocess.CalledProcessError:
            failed.append(row.name)
    require_none(failed, "trained")


def evaluate(runs: Sequence[Trained], options: argparse.Namespace, data: str) -> None:
    """Decode the held-out prompts with each run, in plain torch.

    Args:
        runs: Trained ones.
        options: Target, folder, number of prompts and tokens.
        data: Has the held-out prompts.
    """
    from tools.systems.acceptance import offline
    from vllm_mtp.torch_host.hf_target import HFTarget
    from vllm_mtp.torch_host.load import load_frozen

    answers = reference(
        options.target,
        data,
        options.out,
        "float32",
        options.prompts,
        options.max_tokens,
    )
    host = HFTarget(load_frozen(options.target, answers.dtype, "cpu"))

    def measure(run: Trained) -> None:
        run.keep("offline", offline(run, host, answers))
        print(f"{run.name}: evaluated", flush=True)

    of_each(runs, measure)


def report(runs: Sequence[Trained]) -> None:
    """Renew docs/experiments.json by these runs, and the page.

    Args:
        runs: Trained ones; what was not evaluated is left out.
    """
    results = json.loads(DATA.read_text("utf-8")) if DATA.is_file() else {}
    for run in runs:
        known = run.results()
        if "offline" in known:
            results[run.name] = {
                "cpu_hours": round(known["train"]["cpu_seconds"] / 3600, 2),
                "cpu": known["cpus"]["train"],
                # Of each prompt, so that rows of other days are paired with these.
                "accepted_and_drafts": {
                    name: [[c.accepted_tokens, c.drafts] for c in run.counts(name)]
                    for name in SETS
                },
            }
    # A line for each row: there are hundreds of prompts.
    lines = [f"{json.dumps(name)}: {json.dumps(of)}" for name, of in results.items()]
    write_whole(DATA, "{" + ",".join(f"\n{line}" for line in lines) + "\n}\n")
    write_whole(PAGE, renewed(PAGE.read_text("utf-8"), results))
    print(f"written: {PAGE}")


def renewed(page: str, results: Mapping[str, Any]) -> str:
    """The page with its table made anew, between the text that is kept by hand."""
    base = next(iter(rows()))
    head = ["Row", "What it changes", "Settings"]
    for name in SETS:
        head += [f"AL, {name}", f"less {base} (95 %)"]
    lines = [_line(row, results, base) for row in rows().values()]
    return marked(page, "experiments", table([*head, "Core hours"], lines))


def _line(row: Row, results: Mapping[str, Any], base: str) -> list[str]:
    changes = dict(row.set or {})
    if row.data != (FIRST,):
        changes["data"] = ",".join(row.data)
    settings = " ".join(f"{name}={value}" for name, value in changes.items())
    cells = [row.name, row.asks, f"`{settings}`" if settings else ""]
    found = results.get(row.name)
    if found is None:
        return cells + [""] * (2 * len(SETS) + 1)
    for name in SETS:
        counts = _counts(found, name)
        cells.append(f"{mean_length(sum(counts[1:], counts[0])):.3f}")
        difference = ""
        if row.name != base and base in results:
            d = paired_difference(counts, _counts(results[base], name))
            difference = f"{d.estimate:+.3f} ({d.low:+.3f} to {d.high:+.3f})"
        cells.append(difference)
    return [*cells, f"{found['cpu_hours']:.2f}"]


def _counts(found: Mapping[str, Any], name: str) -> list[AcceptanceCounts]:
    return [
        AcceptanceCounts(drafts, 0, (accepted,))
        for accepted, drafts in found["accepted_and_drafts"][name]
    ]


if __name__ == "__main__":
    sys.exit(main())
