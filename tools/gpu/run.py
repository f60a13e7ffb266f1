#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""The GPU run: exactness, waits and costs within a budget of time.

python tools/gpu/run.py --plan                   what it does, and for how long
python tools/gpu/run.py --out $OUT               on the GPU machine
python tools/gpu/run.py --dry-run --out FOLDER   tiny, on a CPU, by the same code
"""

import argparse
import ctypes
import importlib.util
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(1, str(ROOT))

from plan import BUDGET, DRY_BUDGET, PIECES, Piece, describe, why_skipped  # noqa: E402
from results import ROWS, Row, append, read, write_tables  # noqa: E402

SCRIPT = Path(__file__).with_name("piece.py")
LOG = "log.txt"
NAMES = [piece.name for piece in PIECES]
CPU_NOTE = (
    "CUDA graphs (a CPU captures none, so nothing was replayed), and PyTorch's own "
    "report of what waits for a GPU"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--plan", action="store_true", help="print it, and end")
    parser.add_argument("--out", type=Path, help="a folder for results, must be empty")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU")
    parser.add_argument(
        "--seconds", type=float, help=f"of this command, {BUDGET} if not given"
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="PIECE")
    options = parser.parse_args(arguments)
    pieces = [
        piece
        for piece in PIECES
        if piece.name in (options.only or NAMES)
        and (piece.needed or options.only or not options.dry_run)
    ]
    if options.plan:
        print(describe())
        return 0
    if options.out is None:
        parser.error("--out: got none, expected a folder for results, such as $OUT")
    if (options.out / ROWS).exists():
        parser.error(f"--out {options.out}: holds {ROWS} of another run; name another")
    # Within a second, before any device time is spent.
    if reason := why_impossible(options.dry_run):
        print(f"run: {reason}", file=sys.stderr)
        return 2
    # So that a piece never outlives this process.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    options.out.mkdir(parents=True, exist_ok=True)
    append(options.out, {"facts": facts(options.dry_run)})
    seconds = options.seconds or (DRY_BUDGET if options.dry_run else BUDGET)
    ok = run_all(pieces, options.out, options.dry_run, begin + seconds)
    print(write_tables(options.out))
    return 0 if ok else 1


def why_impossible(dry: bool) -> str | None:
    """Why nothing can run here, if so; imports nothing large."""
    missing = [n for n in ("torch", "vllm") if importlib.util.find_spec(n) is None]
    if missing:
        return (
            f"no module {', '.join(missing)} on Python's path; send the loads that "
            "pack.py makes, unpack them, and set PYTHONPATH=FOLDER/site "
            "(tools/gpu/README.md)"
        )
    try:
        version("vllm-mtp")
    except PackageNotFoundError:
        return (
            "vllm-mtp is not installed, so vLLM cannot find the method; unpack the "
            "load that holds it (tools/gpu/README.md)"
        )
    if dry:
        return None
    try:
        count, cuda = ctypes.c_int(), ctypes.CDLL("libcuda.so.1")
        found = not cuda.cuInit(0) and not cuda.cuDeviceGetCount(ctypes.byref(count))
    except OSError:
        found = False
    if not found or not count.value:
        return "no NVIDIA GPU here; expected one, or --dry-run"
    return None


def facts(dry: bool) -> Row:
    """What a figure must be noted with."""
    return {
        "device": platform.machine() if dry else _asked("nvidia-smi", "-L"),
        "driver": ""
        if dry
        else _asked(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {n: _version(n) for n in _PACKAGES} | {"python": sys.version[:7]},
        "commit": _asked("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"),
        "did not run": CPU_NOTE if dry else "",
    }


_PACKAGES = ("vllm", "vllm-mtp", "torch", "triton", "transformers")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _asked(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def run_all(pieces: Sequence[Piece], out: Path, dry: bool, deadline: float) -> bool:
    """Run pieces until the deadline; what is not started is reported as skipped.

    Args:
        pieces: In order.
        out: Takes rows, tables and the log, after every piece.
        dry: Tiny, on a CPU.
        deadline: On the monotonic clock.

    Returns:
        Whether all needed pieces are done and all is as it must be.
    """
    ok, broken = True, ""
    for piece in pieces:
        left = deadline - time.monotonic()
        reason = broken or why_skipped(piece, left)
        status: Row = {"piece": piece.name, "needed": piece.needed}
        if reason:
            status |= {"status": "skipped", "reason": reason}
        else:
            begin = time.monotonic()
            # The limits are a GPU's.
            limit = left if dry else min(piece.limit, left)
            how, why = run_piece(piece, out, dry, limit)
            seconds = round(time.monotonic() - begin, 1)
            status |= {"status": how, "reason": why, "seconds": seconds}
            status |= {"estimate": piece.estimate}
        append(out, status)
        write_tables(out)
        print(f"{piece.name}: {status['status']} {status['reason']}", flush=True)
        ok &= status["status"] == "done" or not piece.needed
        if piece.name == "check" and status["status"] != "done":
            broken = "check did not pass"
    return ok


def run_piece(piece: Piece, out: Path, dry: bool, limit: float) -> tuple[str, str]:
    """Run one piece in a process of its own, so that a crash or a hang ends it alone.

    Returns:
        ``done``, ``failed`` or ``timeout``, and the reason.
    """
    command = [sys.executable, str(SCRIPT), piece.name]
    command += ["--out", str(out), *(["--dry-run"] if dry else [])]
    with (out / LOG).open("ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(dry),
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return "timeout", f"killed after {limit:.0f} s; what it found is kept"
        finally:
            process.kill()
            process.wait()
    if code == 0:
        return "done", ""
    if code < 0:
        return "failed", f"ended by {signal.Signals(-code).name}; {LOG} has the rest"
    found = [row for row in read(out) if row.get("piece") == piece.name]
    faults = [str(row[key]) for row in found for key in _FAULTS if row.get(key)]
    reason = faults[0] if faults else _last_line(out / LOG, start)
    return "failed", reason.splitlines()[0][:300]


_FAULTS = ("faults", "failed", "where")


def environment(dry: bool) -> dict[str, str]:
    """For a piece; on a CPU the V2 runner needs Triton's interpreter."""
    if not dry:
        return dict(os.environ)
    path = [str(ROOT / "tests/serving/triton_interpreter")]
    path += filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "TORCHDYNAMO_DISABLE": "1",
    }


def _last_line(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "no output"


if __name__ == "__main__":
    sys.exit(main())
