# SPDX-License-Identifier: Apache-2.0
"""The command line of `tools.systems`."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import tools.systems
from tools.command import Parser, above_0, count, finish, require
from tools.systems.presets import presets
from vllm_mtp.errors import MTPError

_DTYPES = ("float32", "bfloat16")
_COMMANDS = ("encode", "train", "evaluate", "cost", "speed", "report")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    options = _parser().parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return finish(
        f"systems {options.command}", lambda: _run(options), "the same command goes on"
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tools.systems",
        description=tools.systems.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=_COMMANDS)
    parser.add_argument("--target", help="the target's folder")
    parser.add_argument("--data", help="folder of its answers")
    parser.add_argument("--out", type=Path, help="where the runs are")
    parser.add_argument("--states", type=Path, help="where the target's states are")
    parser.add_argument("--only", nargs="*", default=[], help="these systems or runs")
    parser.add_argument(
        "--minutes", type=above_0, default=15.0, help="of one core, for each training"
    )
    parser.add_argument(
        "--max-steps", type=count, help="optimizer steps in place of the minutes"
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="float32",
        help="of the target, to count what is accepted",
    )
    parser.add_argument(
        "--timed-dtype",
        choices=_DTYPES,
        default="bfloat16",
        help="of the target, to time drafts and to measure speed",
    )
    parser.add_argument(
        "--prompts", type=count, default=64, help="most of each set, to evaluate"
    )
    parser.add_argument(
        "--max-tokens", type=count, default=128, help="longest answer, to evaluate"
    )
    parser.add_argument(
        "--best", type=count, default=8, help="systems whose speed is measured"
    )
    parser.add_argument(
        "--speed-prompts", type=count, default=10, help="prompts of each round of that"
    )
    parser.add_argument(
        "--rounds", type=count, default=3, help="how often sides take turns to be timed"
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.command == "report":
        return _report(options)
    if options.command == "encode":
        from tools.systems.encode import encode

        require(options, "target", "data", "states")
        encode(options.target, options.data, options.states)
        return 0
    require(options, "target", "out")
    if options.command != "speed":
        require(options, "data")
    if options.command == "train":
        return _train(options)
    # Here, since they load torch and more.
    from tools.systems import acceptance, speed
    from tools.systems.reference import reference
    from tools.systems.runs import trained_runs

    runs = trained_runs(options.out, options.only)
    if options.command == "speed":
        speed.speed(
            runs,
            options.target,
            options.timed_dtype,
            options.best,
            options.speed_prompts,
            options.rounds,
        )
        return 0
    answers = reference(
        options.target,
        options.data,
        options.out,
        options.dtype,
        options.prompts,
        options.max_tokens,
    )
    if options.command == "cost":
        speed.cost(runs, options.target, answers, options.timed_dtype, options.rounds)
    else:
        acceptance.evaluate(runs, options.target, answers)
    return 0


def _train(options: argparse.Namespace) -> int:
    from tools.systems.runs import require_none
    from tools.systems.train import train, use_large_pages

    use_large_pages()
    # Arms train for as long as their question takes, by `vllm-mtp train`.
    names = options.only or [n for n, preset in presets().items() if not preset.is_arm]
    if unknown := sorted(set(names) - set(presets())):
        raise MTPError(f"--only {unknown[0]}: expected some of {', '.join(presets())}")
    failed = []
    for name in names:
        try:
            train(
                presets()[name],
                options.target,
                options.data,
                options.out,
                options.minutes,
                options.max_steps,
                options.states,
            )
        except subprocess.CalledProcessError:
            failed.append(name)
    require_none(failed, "trained")
    return 0


def _report(options: argparse.Namespace) -> int:
    from tools.systems import report

    results = report.NOTHING
    if report.DATA.is_file():
        results = json.loads(report.DATA.read_text("utf-8"))
    if options.out is not None:
        from tools.systems.gather import gathered
        from tools.systems.runs import trained_runs

        require(options, "data")
        runs = trained_runs(options.out, options.only)
        results = report.merged(results, gathered(runs, options.data))
    report.write(results)
    print(f"written: {report.PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
