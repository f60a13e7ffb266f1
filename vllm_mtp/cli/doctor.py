# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp doctor``: can the method work with the vLLM that is installed?"""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version

from vllm_mtp import engine
from vllm_mtp.bench.cpu_settings import fastest_environment
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.errors import MTPError
from vllm_mtp.families import Family, Own, Served, families_of
from vllm_mtp.flags import flag
from vllm_mtp.serving import ledger, versions


@dataclass
class Doctor:
    """Check whether the method can work with the vLLM that is installed here: its
    version and runner, every symbol that the plugin needs, and what is wrong with
    the fix. With a target, also what is known of its family, from its config alone.
    Exit code 1 when the method cannot work."""

    target: str | None = flag(
        "a target's Hugging Face folder or hub id: can it be served and trained for?",
        None,
    )

    def run(self) -> int:
        findings = examine()
        if self.target is not None:
            findings += examine_target(self.target)
        width = max(len(finding.topic) for finding in findings)
        for finding in findings:
            print(f"{finding.mark} {finding.topic:<{width}}  {finding.text}")
        failed = sum(finding.failed for finding in findings)
        print(f"\n{failed} problem(s)" if failed else "\nthe method can work here")
        return 1 if failed else 0


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
        *_cpu_libraries(),
        *(_hook(patch) for patch in ledger.PATCHES),
    ]


def examine_target(target: str) -> list[Finding]:
    """What a target's config says, and what is known of its family."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(target)
    except Exception as error:  # the hub client and configs raise many kinds
        reason = " ".join(str(error).split())[:300]
        return [Finding("target", f"{target}: no config to be read ({reason})", True)]
    architectures = list(config.architectures or ())
    name = f"{target}: {config.model_type} ({', '.join(architectures) or 'no class'})"
    try:
        facts = TargetFacts.from_hf_config(config)
    except MTPError as error:
        return [Finding("target", f"{name}: {error}", True)]
    text = f"{name}, {facts.num_hidden_layers} layers"
    if facts.cached_layers is not None:
        text += f", of which {list(facts.cached_layers)} have a KV cache to read"
    findings = [Finding("target", text)]
    families = families_of(architectures)
    for family in families:
        refused = family.v1 is Served.REFUSED
        served = f"V1: {family.v1.value}; V2: {family.v2.value}"
        note = f" ({family.note})" if family.note else ""
        findings.append(Finding("family", f"{family.name}: {served}{note}", refused))
    if families and families[0].v1 in (Served.EXACT, Served.TIES):
        findings.append(Finding("layers", _layers_text(families[0])))
    if not families:
        text = (
            "not in the table of families; it is served and trained if its own forward "
            "shows at start that its layers can be followed"
        )
        findings.append(Finding("family", text, note=True))
    return findings


def _layers_text(family: Family) -> str:
    shared = "shared ones" if family.shared else "no shared ones"
    own = {
        Own.COPY: "own ones, which start as copies of the target's",
        Own.RANDOM: "own ones with --own-init random",
    }[family.own]
    return f"{shared}; {own}; `vllm-mtp train` takes it"


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


def _vllm_version() -> Finding:
    found = versions.installed()
    if found is None:
        return Finding("vLLM", "not installed; install the vLLM of your hardware", True)
    if problem := versions.problem_with(found):
        return Finding("vLLM", f"{found}: {problem}", True)
    if caution := versions.caution_about(found):
        return Finding("vLLM", f"{found}: {caution}", note=True)
    return Finding("vLLM", f"{found} (tested: {', '.join(versions.TESTED)})")


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
    release = _release()
    has_v2 = release is None or release.v2.status is not versions.Status.ABSENT
    by_default = "V2" if engine.has_triton() and has_v2 else "V1"
    return Finding(
        "runner",
        f"{versions.forced_runner() or by_default} (platform {engine.platform_name()})",
    )


def _cpu_libraries() -> list[Finding]:
    """What makes vLLM slower than need be on a CPU."""
    if not engine.is_cpu():
        return []
    missing = fastest_environment(os.environ)
    if not missing:
        return [Finding("speed", "OpenMP and cores are chosen")]
    settings = " ".join(f"{name}={value}" for name, value in sorted(missing.items()))
    text = f"vLLM may be faster here with {settings} (docs/benchmark.md)"
    return [Finding("speed", text, note=True)]


def _release() -> versions.Release | None:
    found = versions.installed()
    return None if found is None else found.release


def _hook(patch: ledger.Patch) -> Finding:
    topic, release = f"hook {patch.name}", _release()
    is_unknown = release is not None and patch.name not in release.hooks
    if is_unknown or ledger.is_outdated(patch):
        return Finding(topic, f"{patch.symbol}: not needed with this vLLM")
    if problem := ledger.problem_with(patch):
        return Finding(topic, problem, True)
    state = "applied" if ledger.is_installed(patch) else "found, applied when needed"
    return Finding(topic, f"{patch.symbol}: {state}")
