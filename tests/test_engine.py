# SPDX-License-Identifier: Apache-2.0
"""How engines are started, with a vLLM that only writes down what it is asked."""

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_mtp import engine
from vllm_mtp.errors import MTPError

SPACE = "VLLM_CPU_KVCACHE_SPACE"
IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"


class FakeLLM:
    """Remembers its settings and the environment that it found."""

    def __init__(self, target: str, **settings: Any) -> None:
        self.target, self.settings = target, settings
        self.environment = dict(os.environ)
        self.stopped = 0
        core = SimpleNamespace(shutdown=self._shutdown, engine_core=None)
        self.llm_engine = SimpleNamespace(engine_core=core)

    def _shutdown(self) -> None:
        self.stopped += 1


@pytest.fixture(autouse=True)
def _fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = ModuleType("vllm")
    vllm.LLM = FakeLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(engine, "is_cpu", lambda: True)
    monkeypatch.setattr(os, "environ", {})


def test_defaults_are_set_where_the_user_said_nothing() -> None:
    with engine.start("target", cache_gib=3, max_model_len=8) as llm:
        assert isinstance(llm, FakeLLM)
        assert (llm.environment[SPACE], llm.environment[IN_PROCESS]) == ("3", "0")
        assert llm.target == "target"
        assert llm.settings == {
            "max_model_len": 8,
            "enforce_eager": True,
            "use_tqdm_on_load": False,
        }


def test_what_the_user_said_stays() -> None:
    os.environ |= {SPACE: "9", IN_PROCESS: "1"}
    with engine.start("target", enforce_eager=False, use_tqdm_on_load=True) as llm:
        assert isinstance(llm, FakeLLM)
        assert (llm.environment[SPACE], llm.environment[IN_PROCESS]) == ("9", "1")
        assert llm.settings == {"enforce_eager": False, "use_tqdm_on_load": True}


def test_an_engine_with_a_process_of_its_own_may_be_asked_for() -> None:
    with engine.start("target", in_process=False) as llm:
        assert isinstance(llm, FakeLLM)
        assert IN_PROCESS not in llm.environment


def test_the_engine_is_stopped_after_an_error_too() -> None:
    running = engine.start("target")
    llm: Any = running.__enter__()
    assert llm.stopped == 0
    running.__exit__(ValueError, ValueError("a prompt was wrong"), None)
    assert llm.stopped == 1


@pytest.mark.parametrize("look", [engine.runner_of, engine.bound_drafter_of])
def test_a_runner_in_another_process_is_out_of_reach(look: Any) -> None:
    os.environ[IN_PROCESS] = "1"
    with (
        engine.start("target") as llm,
        pytest.raises(MTPError, match=f"{IN_PROCESS} is '1', .* expected 0. Unset it"),
    ):
        look(llm)


@pytest.mark.parametrize("name", ["drafter", "speculator"])
def test_our_drafter_is_found_on_either_runner(name: str) -> None:
    proposer = SimpleNamespace(_bound="bound")
    runner = SimpleNamespace(**{name: proposer})
    worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
    core = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
    llm: Any = FakeLLM("target")
    llm.llm_engine.engine_core.engine_core = core
    assert engine.runner_of(llm) is runner
    assert engine.drafter_of(llm) is proposer
    assert engine.bound_drafter_of(llm) == "bound"
