# SPDX-License-Identifier: Apache-2.0
"""With what vLLM is fastest on a CPU, so that the baseline is fair: type, environment.

Two settings of the environment, the same for every side:

- Intel's OpenMP is preloaded, as vLLM's documentation asks for on x86; its package
  comes with vLLM's CPU build. With GNU's, a step waits longer for its threads.
- No core is kept free for the server's other processes. By default one is, which on two
  cores leaves one to compute with.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch

from vllm_mtp.bench.cpu import this_cpu

_PRELOAD = "LD_PRELOAD"
_RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
_OPENMP_PACKAGE, _OPENMP_FILE = "intel-openmp", "libiomp5.so"


def fastest_dtype() -> str:
    """The type in which this machine decodes fastest.

    Without bfloat16 instructions a CPU emulates them, which costs more than reading
    half the bytes saves as soon as several rows are computed at once.
    """
    if torch.cuda.is_available():
        return "auto"
    if not torch.backends.mkldnn.is_available():
        return "float32"
    # On x86, oneDNN supports bfloat16 wherever there is AVX-512, by emulation too.
    cpu = this_cpu()
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if fast and (cpu.has_bfloat16 or not cpu.is_x86) else "float32"


def fastest_environment(given: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment; nothing where a GPU computes.

    Args:
        given: The environment as it is. What it says of OpenMP or cores is left so.
    """
    if torch.cuda.is_available():
        return {}
    wanted = {}
    preloaded = given.get(_PRELOAD, "")
    library = intel_openmp()
    if library is not None and "omp" not in preloaded:
        wanted[_PRELOAD] = ":".join(filter(None, (preloaded, str(library))))
    if not {_RESERVED, "VLLM_CPU_OMP_THREADS_BIND"} & set(given):
        wanted[_RESERVED] = "0"
    return wanted


def intel_openmp() -> Path | None:
    """Intel's OpenMP library, where its package is installed."""
    try:
        installed = files(_OPENMP_PACKAGE) or []
    except PackageNotFoundError:
        return None
    found = [file for file in installed if file.name == _OPENMP_FILE]
    path = Path(str(found[0].locate())).resolve() if found else None
    return path if path is not None and path.is_file() else None


@contextmanager
def added(environment: Mapping[str, str]) -> Iterator[None]:
    """This process's environment, and so that of processes started, with additions."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def shown(environment: Mapping[str, str]) -> str:
    """For a report: libraries without their folders."""
    short = {
        name: ":".join(Path(part).name for part in value.split(":"))
        if name == _PRELOAD
        else value
        for name, value in environment.items()
    }
    return " ".join(f"{name}={value}" for name, value in sorted(short.items()))
