# SPDX-License-Identifier: Apache-2.0
"""Async scheduling on a CPU, which vLLM turns off there.

With it, a step is scheduled before the tokens of the last one are known on the host:
what a drafter reads of them on the host would be wrong, or late.
"""

import importlib
from typing import Any

import pytest
import torch
from vllm.platforms.cpu import CpuPlatform

from tests.serving.engines import ON_V2


class _Nothing:
    """A CUDA stream or event where all work is done when a call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cpu")

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    record = wait = synchronize = wait_stream = wait_event = _nothing


def force_async_scheduling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that start from now on schedule ahead.

    The CPU's V1 runner has no stand-ins for CUDA's streams after its construction,
    since it never needs them without async scheduling.
    """
    if ON_V2:
        # It puts stand-ins of its own in place, once; they must outlive the test.
        importlib.import_module("vllm.v1.worker.cpu.shm")
    original = CpuPlatform.check_and_update_config

    def keep_it_on(vllm_config: Any) -> None:
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(
        CpuPlatform, "check_and_update_config", staticmethod(keep_it_on)
    )
    for name in ("Event", "Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, _Nothing)
