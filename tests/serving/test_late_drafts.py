# SPDX-License-Identifier: Apache-2.0
"""Drafts that are made when the engine fetches them, and requests that need none."""

import random
from collections.abc import Callable
from pathlib import Path
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
def test_only_requests_that_go_on_are_drafted_for(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    spec = {
        "method": "mtp_placeholder",
        "model": str(tiny_drafter("llama", "mixed")),
    }
    prompts = [[7] * 20, [9] * 30, [11] * 9]
    lengths = [3, 18, 9]
    with engine(tiny_targets["llama"], spec) as llm:
        alone = [
            generate(llm, [prompt], length, logprobs=None).token_ids[0]
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        bound = bound_drafter_of(llm)
        forward, batches = bound.forward, []

        def noted(anchor_ids: Any, *rest: Any) -> Any:
            batches.append(len(anchor_ids))
            return forward(anchor_ids, *rest)

        bound.forward = noted
        together = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [
                SamplingParams(
                    temperature=0, max_tokens=n, ignore_eos=True, detokenize=False
                )
                for n in lengths
            ],
            use_tqdm=False,
        )
    assert [list(output.outputs[0].token_ids) for output in together] == alone
    # The first and the last to end leave the batch in the middle of a step.
    assert batches[0] == 3
    assert batches[-1] == 1
    assert batches == sorted(batches, reverse=True)


@pytest.mark.engine
@pytest.mark.skipif(ON_V2, reason="V2 drafts on the device")
def test_a_request_chooses_how_much_is_drafted_for_it(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    drafter = str(tiny_drafter("llama", "shared-4"))
    spec = {"method": "mtp_placeholder", "model": drafter}
    prompts = [[7] * 20, [9] * 30]
    with engine(tiny_targets["llama"], spec) as llm:
        whole = generate(llm, prompts, 12)
        for most in range(5):
            asked = {"num_speculative_tokens": most}
            run = generate(llm, prompts, 12, extra_args=asked)
            assert run.token_ids == whole.token_ids
            positions = run.counts.accepted_per_position
            assert not any(positions[most:])
            assert run.counts.draft_tokens <= most * run.counts.drafts
            assert (run.counts.drafts > 0) == (most > 0)
    assert run.counts == whole.counts


@pytest.mark.engine
@pytest.mark.skipif(ON_V2, reason="V2 has one length for all")
def test_the_length_left_to_us_changes_no_text(
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock that jumps makes it change its mind all the time; texts that repeat
    themselves are copied, and requests come and go."""
    drafter = str(tiny_drafter("llama", "mixed"))
    prompts = [[7] * 20, list(range(3, 90)) * 2, [9, 4] * 16, [11] * 70, [3, 5, 8]]
    sampled = {"temperature": 0.9, "seed": 5, "logprobs": None}
    with engine(tiny_targets["llama"], None) as llm:
        plain = generate(llm, prompts, 60)
    texts = []
    for jumps in (1, 2):
        monkeypatch.setattr("vllm_mtp.serving.v1._now_ms", jumping(jumps))
        left = {
            "method": "mtp_placeholder",
            "model": drafter,
            "num_speculative_tokens": None,
        }
        with engine(tiny_targets["llama"], left, max_num_seqs=3) as llm:
            seen = watch_plans(runner_of(llm).drafter.lengths)
            runs = [generate(llm, prompts, 60) for _ in range(3)]
            texts.append(generate(llm, prompts, 30, **sampled).token_ids)
        assert all(run.token_ids == plain.token_ids for run in runs)
        assert {plan.num_tokens for plan in seen} >= {0, 4}
        assert any(plan.copied for plan in seen)
        assert sum(run.counts.accepted_tokens for run in runs) > 0
    assert texts[0] == texts[1], "a seed holds whatever the clock says"


def jumping(seed: int) -> Callable[[], float]:
    """A clock."""
    chance, now = random.Random(seed), 0.0

    def clock() -> float:
        nonlocal now
        now += chance.choice([0.1, 1.0, 1.0, 9.0])
        return now

    return clock


def watch_plans(chooser: Any) -> list[Any]:
    plans: list[Any] = []
    original = chooser.plan

    def noted(*args: Any) -> Any:
        plans.append(original(*args))
        return plans[-1]

    chooser.plan = noted
    return plans
