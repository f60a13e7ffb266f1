# SPDX-License-Identifier: Apache-2.0
"""Decoding steps of an engine in this process, under torch's profiler."""

import os
import time
from dataclasses import dataclass
from typing import Any

from vllm_mtp.bench.plan import Side
from vllm_mtp.bench.step_profile import Scope, StepProfile, time_of_parts
from vllm_mtp.engine import is_cpu, sampling, start
from vllm_mtp.errors import MTPError


@dataclass(frozen=True)
class StepsWanted:
    """Which steps to profile.

    Attributes:
        side: Its number of tokens is fixed.
        target: The target's folder.
        settings: Arguments of ``vllm.LLM`` that all sides have.
        prompts: Token ids of the requests, as many as the largest of ``batches``.
        batches: Requests at once.
        steps: Steps to average, of each batch.
    """

    side: Side
    target: str
    settings: dict[str, Any]
    prompts: tuple[tuple[int, ...], ...]
    batches: tuple[int, ...]
    steps: int


def profile_steps(wanted: StepsWanted) -> list[StepProfile]:
    """Profile decoding, one batch size after the other.

    The engine is one process on the V1 runner, so that all its scopes are seen: for a
    process of its own, since both are chosen when vLLM is imported. Only on a CPU do
    the scopes say how long the work took, and not how long it took to ask for it.

    Raises:
        MTPError: vLLM runs on a GPU, or the requests reached ``max_model_len``.
    """
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CUSTOM_SCOPES_FOR_PROFILING": "1",
    }
    if not is_cpu():
        raise MTPError(
            "--profile: on a GPU a step's parts overlap; use vLLM's own torch profiler "
            "(--profiler-config), which shows the drafter's scopes as well"
        )
    settings = wanted.settings | {
        "speculative_config": wanted.side.speculative_config,
        "disable_log_stats": True,
    }
    with start(wanted.target, **settings) as llm:
        return [_profile(llm.llm_engine, wanted, batch) for batch in wanted.batches]


def _profile(engine: Any, wanted: StepsWanted, batch: int) -> StepProfile:
    from torch.profiler import ProfilerActivity, profile

    _start_requests(engine, wanted, batch)
    undisturbed = _timed_steps(engine, wanted.steps)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        disturbed = _timed_steps(engine, wanted.steps)
    if (left := engine.get_num_unfinished_requests()) < batch:
        raise MTPError(
            f"--max-model-len: {batch - left} of {batch} requests reached it within "
            f"{2 * wanted.steps} profiled steps; give more"
        )
    engine.abort_request([str(index) for index in range(batch)])
    while engine.has_unfinished_requests():
        engine.step()
    scopes = (
        Scope(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
    )
    parts = {
        part: time_us / 1e3 / wanted.steps
        for part, time_us in time_of_parts(scopes).items()
    }
    return StepProfile(
        wanted.side.name,
        batch,
        wanted.steps,
        disturbed,
        undisturbed,
        parts,
        drafter=wanted.side.family if wanted.side.speculative_config else "",
        tokens=wanted.side.num_speculative_tokens or 0,
    )


def _start_requests(engine: Any, wanted: StepsWanted, batch: int) -> None:
    """Until all prompts are read, and what the first steps set up is there."""
    # Up to the limit of the model, so that none ends while steps are timed.
    until_limit = sampling(max_tokens=None, ignore_eos=True)
    for index, prompt in enumerate(wanted.prompts[:batch]):
        engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, until_limit)
    started: set[str] = set()
    while len(started) < batch:
        started |= {output.request_id for output in engine.step()}
    for _ in range(2):
        engine.step()


def _timed_steps(engine: Any, count: int) -> float:
    """Milliseconds of one of ``count`` steps."""
    start = time.perf_counter()
    for _ in range(count):
        engine.step()
    return (time.perf_counter() - start) * 1e3 / count
