# SPDX-License-Identifier: Apache-2.0
"""Drafts that are made when the engine fetches them, and requests that need none."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams

from tests.serving.engines import (
    ON_V2,
    bound_drafter_of,
    core_of,
    engine,
    generate,
    runner_of,
)
from vllm_mtp.serving.v1 import has_finished


@pytest.mark.engine
@pytest.mark.skipif(ON_V2, reason="V2 drafts on the device")
def test_an_engine_drafts_when_the_tokens_have_left(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    spec = {
        "method": "mtp_placeholder",
        "model": str(tiny_drafter("llama", "shared-4")),
    }
    with engine(tiny_targets["llama"], spec) as llm:
        events: list[str] = []
        bound, executor = bound_drafter_of(llm), core_of(llm).model_executor
        watch(events, "sample", executor, "sample_tokens")
        watch(events, "ask", executor, "take_draft_token_ids")
        watch(events, "draft", bound, "forward")
        run = generate(llm, [[7] * 20], 12)
        # What was fetched once is not drafted again.
        assert runner_of(llm).drafter.late_drafts() is None
    assert run.counts.accepted_tokens > 0
    steps = "".join(event[0] for event in events).split("s")[1:]
    # With the last step's tokens the request has ended, so nobody drafts for it.
    assert steps == ["ad"] * (len(steps) - 1) + ["a"]


def watch(events: list[str], event: str, owner: Any, name: str) -> None:
    """Note each call before it is made."""
    original = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        events.append(event)
        return original(*args, **kwargs)

    setattr(owner, name, noted)


EOS, STOP = 2, 7


@pytest.mark.parametrize(
    ("output", "settings", "finished"),
    [
        ([5, 5], {}, False),
        ([5, EOS], {}, True),
        ([5, EOS, 6, 6], {}, True),  # in the middle of the step's tokens
        ([EOS, 5, 6, 6], {}, False),  # not of this step
        ([5, EOS], {"ignore_eos": True}, False),
        ([5, STOP], {}, False),
        ([5, STOP], {"stop_token_ids": [STOP]}, True),
        ([5, STOP], {"stop_token_ids": [STOP], "ignore_eos": True}, True),
        ([5] * 9, {}, False),
        ([5] * 10, {}, True),
        ([5] * 11, {}, True),
        ([5] * 11, {"max_tokens": None}, False),
        ([], {}, False),
    ],
)
def test_a_request_has_finished(
    output: list[int], settings: dict[str, Any], finished: bool
) -> None:
    params = SamplingParams(**{"max_tokens": 10, **settings})
    params.update_from_generation_config({}, eos_token_id=EOS)
    assert has_finished(params, output, newest=3) == finished


def test_pooling_requests_have_no_end() -> None:
    assert not has_finished(None, [], newest=3)


@pytest.mark.engine
@pytest.mark.skipif(ON_V2, reason="V2 drafts on the device")
def test_one_request_that_goes_on_is_enough(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    spec = {
        "method": "mtp_placeholder",
        "model": str(tiny_drafter("llama", "shared-1")),
    }
    with engine(tiny_targets["llama"], spec) as llm:
        drafter = runner_of(llm).drafter
        done, going = (
            SimpleNamespace(
                sampling_params=SamplingParams(max_tokens=3), output_token_ids=[5] * n
            )
            for n in (3, 2)
        )
        for requests, finished in (([done, done], True), ([done, going], False)):
            drafter._runner = SimpleNamespace(
                requests=dict(enumerate(requests)),
                input_batch=SimpleNamespace(req_ids=range(2)),
            )
            assert drafter._all_have_finished(1) == finished
        drafter._runner = runner_of(llm)
