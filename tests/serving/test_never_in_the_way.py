# SPDX-License-Identifier: Apache-2.0
"""Installed and not used, or broken: vLLM works as if the plugin were not there."""

import functools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_mtp.plugin import register
from vllm_mtp.serving import ledger

NGRAM = '{"method": "ngram", "num_speculative_tokens": 2}'


def fresh_process(*command: str, **environment: str) -> subprocess.CompletedProcess:
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    return subprocess.run(
        [sys.executable, *command],
        env=defaults | os.environ | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )


def answers(target: Path, *spec: str, **environment: str) -> dict[str, Any]:
    done = fresh_process(
        "-m", "tests.serving.untouched_engine", str(target), *spec, **environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


@pytest.mark.engine
@pytest.mark.parametrize(
    "spec", [(), pytest.param((NGRAM,), marks=pytest.mark.slow)], ids=["none", "ngram"]
)
def test_outputs_are_the_same_to_the_bit(
    spec: tuple[str, ...], tiny_llama: Path
) -> None:
    installed = answers(tiny_llama, *spec)
    left_out = answers(tiny_llama, *spec, VLLM_PLUGINS="")
    assert left_out.pop("loaded") == []
    loaded = installed.pop("loaded")
    assert "vllm_mtp.plugin" in loaded
    assert set(loaded) <= {
        "vllm_mtp",
        "vllm_mtp.plugin",
        "vllm_mtp.errors",
        "vllm_mtp.serving",
        "vllm_mtp.serving.ledger",
        "vllm_mtp.serving.hooks",
        "vllm_mtp.serving.versions",
    }
    assert sum(map(len, installed["tokens"])) == 72
    assert installed == left_out


BREAKAGES = {
    # name: what happens before vLLM loads its plugins, and what the log says
    "our package cannot be imported": (
        "sys.modules['vllm_mtp.serving.ledger'] = None",
        "import of vllm_mtp.serving.ledger halted",
    ),
    "our package has a fault": (
        "sys.modules['vllm_mtp.serving.hooks'] = types.ModuleType('hooks')",
        "has no attribute 'create_speculative_config'",
    ),
    "the hook has other parameters": (
        "EngineArgs.create_speculative_config = lambda self, everything: None",
        "it has no parameter target_model_config, target_parallel_config any more",
    ),
    "the hook is gone": (
        "del EngineArgs.create_speculative_config",
        "create_speculative_config: it is not there",
    ),
}


# vLLM is imported once; each breakage happens in a fork of its own.
IN_FORKS = """
import json, os, sys, tempfile, types
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

original = EngineArgs.create_speculative_config

def start(target, spec):
    args = EngineArgs(model=target, skip_tokenizer_init=True, speculative_config=spec)
    return args.create_engine_config().speculative_config

def attempt(breakage, target):
    exec(breakage)
    load_general_plugins()
    load_general_plugins()
    if "EngineArgs" in breakage:
        EngineArgs.create_speculative_config = original  # for vLLM's own sake
    result = {"none": start(target, None) is None}
    ngram = {"method": "ngram", "num_speculative_tokens": 2}
    result["ngram"] = start(target, ngram).method
    try:
        start(target, {"method": "mtp_placeholder"})
    except Exception as error:
        result["ours"] = str(error)
    return result

for name, breakage in json.loads(sys.argv[1]).items():
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if child == 0:
            os.dup2(log.fileno(), 2)
            print(json.dumps(attempt(breakage, sys.argv[2])), file=out, flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        log.seek(0), out.seek(0)
        found = {"status": status, "log": log.read(), "result": out.read()}
        print(json.dumps([name, found]), flush=True)
"""


def test_a_broken_plugin_ends_only_its_own_method(tiny_llama: Path) -> None:
    """Without the hook, vLLM itself refuses the method; the log says why."""
    breakages = {name: breakage for name, (breakage, _) in BREAKAGES.items()}
    done = fresh_process("-c", IN_FORKS, json.dumps(breakages), str(tiny_llama))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()  # vLLM logs there, too
    found = dict(json.loads(line) for line in lines if line.startswith('["'))
    assert list(found) == list(BREAKAGES)
    for name, (_, message) in BREAKAGES.items():
        log = found[name]["log"]
        assert found[name]["status"] == 0, log[-3000:]
        result = json.loads(found[name]["result"])
        assert (result["none"], result["ngram"]) == (True, "ngram")
        assert "mtp_placeholder" in result["ours"]
        assert log.count("vllm-mtp could not register") == 1
        assert "vllm-mtp doctor" in log
        assert message in log


def test_a_missing_hook_of_the_runner_ends_only_our_method(
    monkeypatch: pytest.MonkeyPatch, smollm2: Path
) -> None:
    from dataclasses import replace

    import vllm.v1.spec_decode.draft_model  # noqa: F401

    gone = replace(
        ledger.V1_PROPOSER, name="gone", symbol="vllm.v1.spec_decode.draft_model:Gone.x"
    )
    monkeypatch.setattr(ledger, "PATCHES", (gone,))
    register()
    ours, ngram = (
        EngineArgs(model=str(smollm2), speculative_config=spec)
        .create_engine_config()
        .speculative_config
        for spec in ({"method": "mtp_placeholder"}, json.loads(NGRAM))
    )
    assert not ngram.uses_draft_model()
    with pytest.raises(ledger.HookMissingError, match=r"Gone\.x: it is not there"):
        ours.uses_draft_model()


@pytest.fixture
def unpatched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """vLLM before any plugin; put back afterwards as it was."""
    register()
    current = EngineArgs.create_speculative_config
    stock = getattr(current, ledger._ORIGINAL)
    monkeypatch.setattr(EngineArgs, "create_speculative_config", stock)
    return stock


class Other:
    """Another plugin that wraps the function that we wrap."""

    def __init__(self, *, polite: bool = True, replace: bool = False) -> None:
        self.calls = 0
        self.polite = polite
        self.replace = replace

    def register(self) -> None:
        original = EngineArgs.create_speculative_config
        stock = getattr(original, ledger._ORIGINAL, original)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return (stock if self.replace else original)(*args, **kwargs)

        if self.polite:
            wrapper = functools.wraps(original)(wrapper)
        EngineArgs.create_speculative_config = wrapper


OTHERS = {
    "wraps": {},
    "wraps without functools": {"polite": False},
    "replaces": {"polite": False, "replace": True},
}


def method_of(target: Path, spec: dict[str, Any]) -> Any:
    args = EngineArgs(model=str(target), speculative_config=spec)
    return type(args.create_engine_config().speculative_config).__name__


@pytest.mark.parametrize("order", ["first", "last", "between two of ours"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_plugins_in_any_order(
    kind: str,
    order: str,
    unpatched: Callable[..., Any],
    smollm2: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # vLLM's loggers do not propagate, so caplog would not see ours.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    other = Other(**OTHERS[kind])
    steps = {
        "first": [other.register, register],
        "last": [register, other.register],
        "between two of ours": [register, other.register, register, register],
    }
    for step in steps[order]:
        step()
    assert "could not register" not in caplog.text
    assert method_of(smollm2, json.loads(NGRAM)) == "SpeculativeConfig"
    assert other.calls == 1
    if (kind, order) == ("replaces", "last"):
        # It leaves out every plugin before it; vLLM itself then refuses the method.
        with pytest.raises(ValueError, match="mtp_placeholder"):
            method_of(smollm2, {"method": "mtp_placeholder"})
        return
    ours = method_of(smollm2, {"method": "mtp_placeholder"})
    assert ours == "MTPPlaceholderSpecConfig"


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_workers_started_either_way_draft(
    start: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """The engine core and its worker are other processes: each registers for itself,
    and the config that arrives there must still be ours."""
    from vllm_mtp.drafter.checkpoint import save_drafter
    from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter

    options = DrafterOptions(dtype="float32")
    drafter = tmp_path / "drafter"
    save_drafter(new_drafter(tiny_llama, "shared:all", 1, options), drafter)
    spec = {"method": "mtp_placeholder", "model": str(drafter)}
    code = f"""
import os
from vllm.platforms.cpu import CpuPlatform
original = CpuPlatform.check_and_update_config

def and_start(config):
    original(config)  # it asks for spawn
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = {start!r}

CpuPlatform.check_and_update_config = staticmethod(and_start)
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm_mtp import read_vllm_counters
    llm = LLM(
        {str(tiny_llama)!r},
        speculative_config={spec},
        skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
        max_model_len=256, max_num_seqs=8, disable_log_stats=False,
    )
    llm.generate(
        [{{"prompt_token_ids": [1, 2, 3]}}],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    counts = read_vllm_counters(llm.get_metrics())
    print("accepted", counts.accepted_tokens, "of", counts.draft_tokens)
"""
    script = tmp_path / "run.py"
    script.write_text(code, "utf-8")
    done = fresh_process(str(script), VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert done.returncode == 0, done.stderr[-3000:]
    # vLLM may log behind it.
    said = [line for line in done.stdout.splitlines() if line.startswith("accepted")]
    _, accepted, _, drafted = said[-1].split()
    assert accepted == drafted != "0"
