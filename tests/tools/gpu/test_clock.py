# SPDX-License-Identifier: Apache-2.0
"""The clock of the GPU measurement, on a runner that only keeps time."""

import time
from types import SimpleNamespace
from typing import Any

from tools.gpu.clock import Step, between, decoding_times, recorded


class Drafter:
    def propose(self) -> str:
        time.sleep(0.002)
        return "drafts"


class Runner:
    def __init__(self) -> None:
        self.drafter = Drafter()

    def execute_model(self, scheduled: Any) -> str:
        time.sleep(0.002)
        return "output"


def llm_with(runner: Runner) -> Any:
    worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
    core = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
    return SimpleNamespace(
        llm_engine=SimpleNamespace(engine_core=SimpleNamespace(engine_core=core))
    )


def test_steps_are_recorded_and_the_runner_is_left_as_it_was() -> None:
    runner = Runner()
    with recorded(llm_with(runner)) as steps:
        for counts in ({"a": 40, "b": 40}, {}, {"a": 3, "b": 3}):
            scheduled = SimpleNamespace(num_scheduled_tokens=counts)
            assert runner.execute_model(scheduled) == "output"
            assert runner.drafter.propose() == "drafts"
    assert [step.counts for step in steps] == [[40, 40], [3, 3]]
    for step in steps:
        assert between(step.start, step.target_end) >= 2
        assert between(step.draft_start, step.draft_end) >= 2
        assert step.draft_start >= step.target_end
    assert not vars(runner.drafter)
    assert list(vars(runner)) == ["drafter"]


def step(at: float, counts: list[int]) -> Step:
    """A target forward of 3 ms, and a draft of 2 ms behind it."""
    return Step(counts, at, at + 0.003, at + 0.003, at + 0.005)


def test_only_steps_in_which_all_decode_count() -> None:
    steps = [
        step(0.0, [100, 100]),  # prefill
        step(0.1, [3, 50]),  # one is still prefilling
        step(0.2, [3, 3]),
        step(0.21, [3, 1]),
        step(0.23, [3]),  # one is done
        step(0.3, [3]),
    ]
    times = decoding_times(steps, 2, 2)
    assert [round(value) for value in times.step] == [10, 20]
    assert [round(value) for value in times.target] == [3, 3]
    assert [round(value) for value in times.draft] == [2, 2]
