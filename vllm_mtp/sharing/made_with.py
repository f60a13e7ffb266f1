# SPDX-License-Identifier: Apache-2.0
"""What a drafter was made with: packages, commit and device, but not whose."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

_PACKAGE = Path(__file__).parents[1]


class GitState(BaseModel):
    """A commit, and whether the package's tracked files were changed after it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha: str = Field(pattern="^[0-9a-f]{40,64}$")
    changed: bool


def versions() -> dict[str, str]:
    """Of Python and of the packages whose numbers decide about a drafter's."""
    found = {"python": platform.python_version()}
    for name in ("vllm-mtp", "torch", "transformers"):
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            continue
    # vLLM is published under several names; its module has one.
    for name in packages_distributions().get("vllm", [])[:1]:
        found["vllm"] = f"{version(name)}" + (f" ({name})" if name != "vllm" else "")
    return found


def git_state(package: Path = _PACKAGE) -> GitState | None:
    """The commit of the checkout that holds the package.

    Returns:
        None where the package is installed, or git is missing.
    """
    # An environment may lie inside some other repository, whose commit says nothing.
    if not (package.parent / ".git").exists():
        return None
    sha = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "-uno", "--", ".")
    return GitState(sha=sha, changed=bool(changes)) if sha else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def device_name(device: torch.device | str, count: int = 1) -> str:
    """Such as ``cuda (NVIDIA H200)``, ``cuda (NVIDIA H200) x 8`` or ``cpu (x86_64)``.

    Args:
        device: Where a process computed.
        count: Number of processes.
    """
    device = torch.device(device)
    if device.type == "cuda":
        model = torch.cuda.get_device_name(device)
    else:
        model = platform.machine()
    return f"{device.type} ({model})" + (f" x {count}" if count > 1 else "")
