#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Run one piece of the plan in this process; `run.py` starts it.

python tools/gpu/piece.py NAME --out FOLDER [--dry-run]
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Record = Callable[[dict[str, Any]], None]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    prepare_environment()
    # Before anything that is installed: this checkout is what is measured.
    sys.path.insert(1, str(ROOT))
    from results import Row, append

    def record(row: Row) -> None:
        append(options.out, {"piece": options.name} | row)
        print(row, flush=True)

    with tempfile.TemporaryDirectory() as work:
        try:
            ok = run(options.name, options.dry_run, Path(work), record)
        except Exception as error:
            record({"failed": f"{type(error).__name__}: {error}"[:600]})
            raise  # for the log
    return 0 if ok else 1


def prepare_environment() -> None:
    """Before vLLM is imported."""
    os.environ |= {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that the clock reaches the runner
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def run(name: str, dry: bool, work: Path, record: Record) -> bool:
    """Run a piece; returns whether all is as it must be.

    Args:
        name: Of `plan.PIECES`.
        dry: Tiny, on a CPU.
        work: Folder for weights.
        record: Takes each row when it is known.
    """
    if name == "check":
        return check(dry, work, record)
    if name.startswith("exact-"):
        from exact import exactness

        return exactness(name.removeprefix("exact-"), dry, work, record)
    if name == "waits":
        from exact import waits

        return waits(dry, work, record)

    from cost import CELLS, DRY_CELLS, DRY_MORE_CELLS, MORE_CELLS, cost
    from sides import mixed_layers, own_layers

    shape = "tiny" if dry else "llama-8b"
    kind, _, who = name.partition("-")
    cells = {
        "cost": DRY_CELLS if dry else CELLS,
        "batches": DRY_MORE_CELLS if dry else MORE_CELLS,
    }[kind]
    side = {
        "target": "none",
        "own": own_layers(shape),
        "mixed": mixed_layers(shape),
        "eagle3": "eagle3",
    }[who]
    return cost(side, shape, cells, dry, work, record)


def check(dry: bool, work: Path, record: Record) -> bool:
    """Import what the other pieces need, and let vLLM alone answer once."""
    from unpack import KERNELS, MODULES, import_all

    faults = import_all([m for m in MODULES if not dry or m not in KERNELS])
    if not faults and not dry:
        import torch

        if not torch.cuda.is_available():
            faults = ["PyTorch finds no GPU"]
    if not faults:
        from exact import side_of
        from sides import make_exact_target

        target = make_exact_target(work / "target")
        with side_of("none", target, work, "bfloat16", (1,), False) as side:
            side.answer([list(range(20))], 2)
    record({"faults": "; ".join(faults)})
    return not faults


if __name__ == "__main__":
    sys.exit(main())
