# SPDX-License-Identifier: Apache-2.0
"""Which CPU this is, and what it can do."""

import platform
import re
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16 = ("avx512_bf16", "amx_bf16")
"""The flags of x86 CPUs that have bfloat16 instructions; either will do."""

# What a report shows: on x86 these make the difference, and on Arm these.
_SHOWN = ("avx2", "avx512f", *BFLOAT16, "asimd", "sve", "bf16", "i8mm")
_X86 = ("x86_64", "amd64", "i686")
# "64-Core Processor" is the whole chip's, and a machine may have two of its cores.
_NOISE = re.compile(r"\((?:R|TM)\)|\s+\d+-Core Processor|\s+CPU @ .*", re.IGNORECASE)


@dataclass(frozen=True)
class Cpu:
    """The CPU of this machine.

    Attributes:
        name: For people; the architecture where the CPU has none, as on Arm.
        flags: What it can do, in Linux's words.
        is_x86: Whether these are the flags of x86.
    """

    name: str
    flags: frozenset[str]
    is_x86: bool

    @property
    def has_bfloat16(self) -> bool:
        """Whether an x86 CPU computes in bfloat16 rather than emulating it."""
        return not self.flags.isdisjoint(BFLOAT16)

    def __str__(self) -> str:
        kinds = [kind for kind in _SHOWN if kind in self.flags]
        return f"{self.name} ({', '.join(kinds)})" if kinds else self.name


def this_cpu() -> Cpu:
    """By ``/proc/cpuinfo``; without that file a name and no flags."""
    machine = platform.machine()
    found: dict[str, str] = {}
    if CPUINFO.is_file():
        for line in CPUINFO.read_text("utf-8").splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    flags = found.get("flags") or found.get("Features") or ""  # Arm has Features
    return Cpu(
        name=_NOISE.sub("", found.get("model name") or machine),
        flags=frozenset(flags.split()),
        is_x86=machine.lower() in _X86,
    )
