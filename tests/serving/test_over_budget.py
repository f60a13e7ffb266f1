# SPDX-License-Identifier: Apache-2.0
"""Scheduled ahead, with more rows wanted than a step may have: 16 requests of every
kind want k + 1 rows each, and their prompts come in pieces between them.

vLLM then plans steps with fewer drafts than it said, before it knows any of them. A
number that stands for a draft (-1) must never be verified in a draft's place.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from vllm import LLM
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from tests.serving.async_scheduling import force_async_scheduling
from tests.serving.engines import ON_V2, counters, engine, runner_of
from tests.serving.lossless.matrix import alike
from tests.serving.lossless.plays import Answer, Stage, drive
from tests.serving.lossless.subjects import (
    MAX_MODEL_LEN,
    Subject,
    tiny_chain_subject,
)

pytestmark = pytest.mark.engine

_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 8}},
    "required": ["name"],
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "JSON": {"structured_outputs": StructuredOutputsParams(json=json.dumps(_SCHEMA))},
    "regex": {"structured_outputs": StructuredOutputsParams(regex="[a-m ]{8,40}")},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "bad words": {"bad_words": ["a", "ef", "gh"]},
    "logprobs": {"logprobs": 2},
    # With no seed: in pieces, such a prompt ends vLLM's engine (docs/upstream).
    "sampled": {"temperature": 1.0, "top_k": 1},
}
if ON_V2:
    del KINDS["sampled"]  # its kernel for top-k does not run under the interpreter
# Not min_tokens, which vLLM's V1 runner counts wrong when it schedules ahead, and no
# prompts as embeddings, for which the method schedules nothing ahead (docs/upstream).
# Beside the drafter's own: k by batch size, and distributions of the drafts.
SPECS: dict[str, dict[str, Any]] = {
    "k = 4": {},
    "k by batch size": {
        "num_speculative_tokens_per_batch_size": [(1, 3, 4), (4, 9, 2), (10, 16, 1)]
    },
    "probabilistic": {"draft_sample_method": "probabilistic"},
}
BUDGETS = (32, 48)
V1 = [(spec, budget) for spec in SPECS for budget in BUDGETS]
# A step takes 0.2 s there.
V2 = [("k = 4", 32)]
NUM_REQUESTS = 8 if ON_V2 else 36


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return tiny_chain_subject(tmp_path_factory.mktemp("chain"))


def play(llm: LLM, subject: Subject) -> list[Answer]:
    """Requests of all kinds, one every step; every seventh is given up."""
    stage = Stage(llm, subject)
    tokens = 8 if ON_V2 else 24
    requests: list[tuple[int, list[int], SamplingParams]] = []
    for number in range(NUM_REQUESTS):
        kind = list(KINDS)[number % len(KINDS)]
        length = (3, 20, 33, 40, 64, 1, 90)[number % 7]
        prompt = subject.stream(f"over budget {number}", length)
        sampling = {"max_tokens": tokens} | KINDS[kind]
        requests.append((number // 3, prompt, stage.params(**sampling)))
    aborted = {n: n // 3 + 2 + n % 9 for n in range(5, NUM_REQUESTS, 7)}
    return drive(llm, requests, aborted)


@contextmanager
def verified(llm: LLM) -> Iterator[Counter[str]]:
    """Counts what V1's steps verify: drafts, and what stands for one."""
    runner, seen = runner_of(llm), Counter[str]()
    sampler = runner.rejection_sampler
    forward = sampler.forward

    def watched(metadata: Any, *args: Any, **kwargs: Any) -> Any:
        starts = metadata.cu_num_draft_tokens.tolist()
        batch, counts = runner.input_batch, metadata.num_draft_tokens
        for name, count, end in zip(batch.req_ids, counts, starts, strict=False):
            request = runner.requests[name]
            drafts = metadata.draft_token_ids[end - count : end].tolist()
            seen["drafts"] += len(drafts)
            # vLLM itself puts -1 behind what a grammar forbids, and pads with it the
            # step of a prompt of which one token is left.
            structured = request.sampling_params.structured_outputs is not None
            if request.num_computed_tokens < request.num_tokens - 1 + structured:
                continue
            first = len(request.output_token_ids) == 0
            if -1 in drafts and not structured and not first:
                seen["stale"] += 1
        seen["most rows"] = max(seen["most rows"], len(metadata.logits_indices))
        return forward(metadata, *args, **kwargs)

    sampler.forward = watched
    try:
        yield seen
    finally:
        del sampler.forward


@pytest.fixture(scope="module")
def alone(subject: Subject) -> dict[int, list[Answer]]:
    """The target's own answers, by budget."""
    found = {}
    for budget in BUDGETS[: 1 if ON_V2 else None]:
        with engine(subject.target, None, **settings(budget)) as llm:
            found[budget] = play(llm, subject)
    return found


def settings(budget: int) -> dict[str, Any]:
    return {
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 16,
        "max_num_batched_tokens": budget,
    }


@pytest.mark.parametrize(("name", "budget"), V2 if ON_V2 else V1)
def test_answers_are_the_targets(
    name: str,
    budget: int,
    subject: Subject,
    alone: dict[int, list[Answer]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force_async_scheduling(monkeypatch)
    spec = subject.spec | SPECS[name]
    with engine(subject.target, spec, **settings(budget)) as llm:
        if ON_V2:
            answers = play(llm, subject)
        else:
            with verified(llm) as seen:
                answers = play(llm, subject)
            assert not seen["stale"], seen
        counts = counters(llm)[0]
    for number, (one, other) in enumerate(zip(alone[budget], answers, strict=True)):
        assert alike(one, other), (number, one, other)
    assert counts.drafts > (10 if ON_V2 else 100)
    assert 0 < counts.accepted_tokens < counts.draft_tokens
