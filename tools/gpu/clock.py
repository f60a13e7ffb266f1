# SPDX-License-Identifier: Apache-2.0
"""Where the time of a decoding step goes, seen from the device.

Marks are set around the runner's target forward and around its drafter, in an engine
of this process. On a GPU they are CUDA events on the runner's stream, so nothing waits
for the device, and what they tell includes the gaps in which it has nothing to do.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_mtp.engine import runner_of


@dataclass
class Step:
    """Marks of one step."""

    counts: list[int]  # tokens scheduled, per request
    start: Any
    target_end: Any
    draft_start: Any = None
    draft_end: Any = None


@dataclass
class Times:
    """Milliseconds of the decoding steps, one list per part."""

    step: list[float] = field(default_factory=list)  # from a start to the next
    target: list[float] = field(default_factory=list)
    draft: list[float] = field(default_factory=list)

    def __iadd__(self, other: "Times") -> "Times":
        self.step += other.step
        self.target += other.target
        self.draft += other.draft
        return self


def mark() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Any, second: Any) -> float:
    """Milliseconds from one mark to another."""
    if isinstance(first, float):
        return (second - first) * 1e3
    return first.elapsed_time(second)


@contextmanager
def recorded(llm: Any) -> Iterator[list[Step]]:
    """Record the steps while the block runs."""
    runner, steps = runner_of(llm), []
    drafter = getattr(runner, "speculator", None) or getattr(runner, "drafter", None)
    execute = runner.execute_model

    def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        start = mark()
        output = execute(scheduled, *args, **kwargs)
        counts = list(scheduled.num_scheduled_tokens.values())
        if counts:  # a call without tokens only lets requests go
            steps.append(Step(counts, start, mark()))
        return output

    runner.execute_model = execute_model
    if drafter is not None:
        drafter.propose = _around(drafter.propose, steps)
    try:
        yield steps
    finally:
        del runner.execute_model
        if drafter is not None:
            del drafter.propose


def _around(propose: Callable[..., Any], steps: list[Step]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = mark()
        drafts = propose(*args, **kwargs)
        if steps:
            steps[-1].draft_start, steps[-1].draft_end = start, mark()
        return drafts

    return wrapper


def decoding_times(steps: list[Step], batch: int, num_tokens: int) -> Times:
    """Times of the steps in which ``batch`` requests decode and none else.

    Args:
        steps: As recorded, in order.
        batch: Requests.
        num_tokens: Tokens drafted per step; 0 without a drafter.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times = Times()
    for step, following in zip(steps, steps[1:], strict=False):
        if len(step.counts) != batch or max(step.counts) > 1 + num_tokens:
            continue
        times.step.append(between(step.start, following.start))
        times.target.append(between(step.start, step.target_end))
        if step.draft_start is not None:
            times.draft.append(between(step.draft_start, step.draft_end))
    return times
