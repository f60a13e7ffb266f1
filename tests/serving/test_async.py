# SPDX-License-Identifier: Apache-2.0
"""Scheduled ahead (vLLM's default on GPUs): that the tests' switch for it works. What
it does to requests are rows of the matrix (`lossless/rows.py`, "scheduled ahead")."""

from collections.abc import Callable
from pathlib import Path

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from tests.serving.async_scheduling import force_async_scheduling
from tests.serving.engines import core_of, engine, generate

pytestmark = pytest.mark.engine


def test_it_is_on(
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force_async_scheduling(monkeypatch)
    spec = {
        "method": "mtp_placeholder",
        "model": str(tiny_drafter("llama", "shared-4")),
    }
    with engine(tiny_targets["llama"], spec) as llm:
        core = core_of(llm)
        assert isinstance(core.scheduler, AsyncScheduler)
        ahead = 0
        update = core.scheduler.update_from_output

        def watched(*args: object) -> object:
            nonlocal ahead
            ahead += len(core.batch_queue)
            return update(*args)

        core.scheduler.update_from_output = watched
        generate(llm, [[1, 2, 3]], 12)
    assert ahead > 2  # steps under way when an earlier one's tokens arrived
