#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""On the GPU machine: put the loads together, install them into a folder, and check.

python tools/gpu/unpack.py LOAD... --to FOLDER            collect, join, install
python tools/gpu/unpack.py --to FOLDER --check            import what the runs need

Afterwards everything runs with PYTHONPATH=FOLDER/site. Only the standard library is
used.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from loads import LoadsError, collect, join, missing_loads, read_index

KERNELS = (
    "vllm._C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa3_C",
    "vllm.vllm_flash_attn",
)
# In this order, so that the first failure names the cause.
MODULES = (
    "torch",
    "triton",
    "transformers",
    "vllm",
    *KERNELS,
    "vllm.model_executor.models.llama",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.entrypoints.llm",
    "vllm_mtp.serving.v2",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("loads", nargs="*", type=Path, help="folders that pack.py made")
    parser.add_argument("--to", type=Path, required=True, help="where to install")
    parser.add_argument("--check", action="store_true", help="import what is needed")
    options = parser.parse_args()
    try:
        for load in options.loads:
            install(load, options.to)
    except LoadsError as error:
        print(f"unpack: {error}", file=sys.stderr)
        return 1
    return check(options.to) if options.check else 0


def install(load: Path, to: Path) -> None:
    """Collect one load, and install every archive that is whole now."""
    index, pool = read_index(load), to / "pieces"
    collect(load, pool)
    for name, entry in index.items():
        done = to / "done" / f"{name}.{entry['sha256'][:16]}"
        if done.exists():
            continue
        if loads := missing_loads(entry, pool):
            print(f"{name}: waits for load {loads}")
            continue
        archive = join(index, name, pool, to)
        with tarfile.open(archive) as tar:
            tar.extractall(to, filter="data")
        archive.unlink()
        for piece in entry["pieces"]:
            (pool / piece["file"]).unlink()
        install_wheels(to)
        done.parent.mkdir(exist_ok=True)
        done.touch()
        print(f"{name}: installed")


def install_wheels(to: Path) -> None:
    """Install the wheels that an archive brought, and nothing that they ask for."""
    wheels = sorted((to / "wheels").glob("*.whl"))
    if not wheels:
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index"]
    pip += ["--no-deps", "--no-compile", "--target", str(to / "site"), "--upgrade"]
    subprocess.run([*pip, *map(str, wheels)], check=True)
    for wheel in wheels:
        wheel.unlink()


def check(to: Path) -> int:
    """Import `MODULES` in a new process; says what fails."""
    path = os.pathsep.join([str(to / "site"), os.environ.get("PYTHONPATH", "")])
    code = "import sys, unpack; sys.exit('\\n'.join(unpack.import_all(unpack.MODULES)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR"},
        check=False,
    )
    return done.returncode


def import_all(names: Sequence[str]) -> list[str]:
    """Import modules in order; returns what went wrong, a line each."""
    faults = []
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            faults.append(
                f"{name}: no module {error.name}; add its package to "
                "tools/gpu/wheels.txt and pack again"
            )
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}")
    return faults


if __name__ == "__main__":
    sys.exit(main())
