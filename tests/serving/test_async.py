# SPDX-License-Identifier: Apache-2.0
"""The scenarios of `test_exact` once more, scheduled ahead (vLLM's default on GPUs)."""

from collections.abc import Callable
from pathlib import Path

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from tests.serving.async_scheduling import force_async_scheduling
from tests.serving.engines import ON_V2, Run, core_of, engine, generate
from tests.serving.scenarios import run_scenarios
from tests.serving.test_exact import SCENARIOS, SETTINGS

pytestmark = pytest.mark.engine

# The first draft of `shared-4` is the target's own, the later ones are mostly wrong.
DRAFTERS = ["shared-4", pytest.param("mixed", marks=pytest.mark.slow)]
NAMES = ["chunked-prefill", "preemption"] if ON_V2 else list(SCENARIOS)
CHOSEN = {name: SCENARIOS[name] for name in NAMES}
AT_LIMIT = {"near-max-model-len"}


@pytest.fixture(scope="module")
def plain(tiny_targets: dict[str, Path]) -> dict[str, list[Run]]:
    """The target alone, scheduled as vLLM does it on a CPU."""
    return run_scenarios(tiny_targets["llama"], None, CHOSEN, SETTINGS).runs


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


@pytest.mark.parametrize("name", DRAFTERS)
def test_outputs_are_the_targets(
    name: str,
    plain: dict[str, list[Run]],
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force_async_scheduling(monkeypatch)
    spec = {"method": "mtp_placeholder", "model": str(tiny_drafter("llama", name))}
    drafted = run_scenarios(tiny_targets["llama"], spec, CHOSEN, SETTINGS).runs
    for scenario in NAMES:
        for reference, run in zip(plain[scenario], drafted[scenario], strict=True):
            assert run.token_ids == reference.token_ids, scenario
            assert 0 < run.counts.accepted_tokens < run.counts.draft_tokens
        if name == "shared-4":
            # As in `test_exact`: one draft per request may be worse at the limit.
            excused = len(SCENARIOS[scenario].lengths) * (scenario in AT_LIMIT)
            counts = drafted[scenario][0].counts
            assert counts.accepted_per_position[0] >= counts.drafts - excused
    assert drafted["preemption"][0].preemptions > 0
    assert drafted["chunked-prefill"][0].chunked > 0
