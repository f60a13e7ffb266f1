# SPDX-License-Identifier: Apache-2.0
"""Random requests, each with whatever parameters chance gives it, beside each other.

The same ones are put to an engine with the drafter and to one without. Chance is
seeded: a failure names the request, and comes again.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from vllm import LLM, RequestOutput, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    StructuredOutputsParams,
)

from tests.serving.engines import counters, engine
from tests.serving.lossless.fields import IN_RANDOM_REQUESTS
from tests.serving.lossless.matrix import alike
from tests.serving.lossless.plays import Answer, answers_of
from tests.serving.lossless.subjects import (
    MAX_MODEL_LEN,
    Subject,
    tiny_chain_subject,
)
from tests.tiny_targets import VOCAB_SIZE

pytestmark = pytest.mark.engine

# A part of the requests has each field, drawn for itself.
STRUCTURED = (
    {"regex": "[a-m ]{5,30}"},
    {"regex": r"(\d{2}-)*[a-z]{4,9}"},
    {"json": {"type": "object", "properties": {"a": {"type": "string"}}}},
    {"choice": ["yes", "no", "abcdef", "abcxyz"]},
    {"grammar": 'root ::= ("a" [b-k]* "," )+'},
    {"json_object": True},
)


def structured(rng: random.Random) -> StructuredOutputsParams:
    return StructuredOutputsParams(**rng.choice(STRUCTURED))


Draw = Callable[[random.Random], Any]
DRAWN: dict[str, tuple[float, Draw]] = {
    "temperature": (1.0, lambda r: r.choice([0.0, 0.0, 0.0, 0.7, 1.3])),
    "top_k": (0.3, lambda r: r.choice([1, 1, 5, 200])),
    "top_p": (0.2, lambda r: r.choice([1e-6, 0.5, 0.95])),
    "min_p": (0.03, lambda r: r.choice([0.0, 0.2])),
    "seed": (0.2, lambda r: r.randrange(5)),
    "n": (0.1, lambda r: r.randint(1, 3)),
    "presence_penalty": (0.1, lambda r: r.choice([-1.0, 0.5, 2.0])),
    "frequency_penalty": (0.1, lambda r: r.choice([-0.5, 0.7])),
    "repetition_penalty": (0.1, lambda r: r.choice([0.8, 1.2, 1.9])),
    "stop": (0.15, lambda r: r.choice([["ef"], ["a", "ti"], "zz"])),
    "include_stop_str_in_output": (0.2, lambda r: r.random() < 0.5),
    "stop_token_ids": (0.15, lambda r: r.sample(range(VOCAB_SIZE), 20)),
    "ignore_eos": (0.7, lambda r: r.random() < 0.8),
    "max_tokens": (1.0, lambda r: r.choice([1, 2, 5, 9, 16, 24, 40])),
    "min_tokens": (0.2, lambda r: r.choice([1, 2, 7, 12])),
    "logprobs": (0.25, lambda r: r.choice([0, 1, 4])),
    "prompt_logprobs": (0.1, lambda r: r.choice([0, 2])),
    "flat_logprobs": (0.1, lambda r: True),
    "detokenize": (0.1, lambda r: r.random() < 0.5),
    "skip_special_tokens": (0.1, lambda r: False),
    "spaces_between_special_tokens": (0.1, lambda r: False),
    "output_kind": (0.2, lambda r: RequestOutputKind.CUMULATIVE),
    "stream_interval": (0.1, lambda r: r.randint(1, 4)),
    "structured_outputs": (0.2, structured),
    "allowed_token_ids": (0.1, lambda r: r.sample(range(VOCAB_SIZE), 200)),
    "bad_words": (0.15, lambda r: r.sample(["a", "ef", "gh", "the", "ab c"], 2)),
    "logit_bias": (0.03, lambda r: {r.randrange(VOCAB_SIZE): 9.0}),
    "logprob_token_ids": (0.03, lambda r: r.sample(range(VOCAB_SIZE), 3)),
    "skip_reading_prefix_cache": (0.1, lambda r: True),
    "extra_args": (
        0.2,
        lambda r: {"num_speculative_tokens": r.choice([0, 1, 2, 3, 4, 4, 99])},
    ),
    "repetition_detection": (
        0.1,
        lambda r: RepetitionDetectionParams(max_pattern_size=6, min_count=2),
    ),
}
# What is refused beside a drafter and not without one (docs/lossless.md).
OURS = (
    "not yet supported with speculative decoding",
    "logprob_token_ids",
    "vllm_xargs.num_speculative_tokens: got 99, expected an integer from 0 to 4",
)


@dataclass(frozen=True)
class Wish:
    """One random request.

    Attributes:
        prompt: Token ids.
        sampling: As for ``SamplingParams``.
        step: Before which it is added.
        abort: Before which it is given up; None where it is not.
    """

    prompt: list[int]
    sampling: dict[str, Any]
    step: int
    abort: int | None

    @property
    def compares(self) -> bool:
        """Whether chance has no part in the answer."""
        certain = self.sampling["temperature"] == 0 or self.sampling.get("top_k") == 1
        return certain and self.abort is None


def wishes(
    seed: int, number: int, stream: Callable[[str, int], list[int]]
) -> list[Wish]:
    """The same for the same seed; some prompts come again."""
    rng, found = random.Random(seed), []
    for index in range(number):
        name = f"random {seed} {rng.randrange(number)}"
        prompt = stream(name, rng.choice([1, 2, 9, 31, 32, 33, 64, 65, 100, 150]))
        sampling = {
            field: draw(rng)
            for field, (chance, draw) in DRAWN.items()
            if rng.random() < chance
        }
        step = index
        given_up = rng.random() < 0.1
        abort = step + rng.randint(1, 9) if given_up else None
        found.append(Wish(prompt, sampling, step, abort))
    return found


@dataclass
class Found:
    """What came of it: answers, or why there was none; and the steady client's."""

    answers: dict[int, list[Answer]]
    refused: dict[int, str]
    steady: list[list[Answer]]


def play(
    llm: LLM, asked: list[Wish], steady_prompt: list[int], **changes: Any
) -> Found:
    """Put all to one engine; one greedy request is always there, again and again.

    Args:
        llm: The engine.
        asked: The requests, by step.
        steady_prompt: The greedy one's.
        changes: Values of every request instead of those drawn.
    """
    found = Found({}, {}, [])
    vllm_engine, turn = llm.llm_engine, 0
    steady = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for step in count():
        for index, wish in enumerate(asked):
            if wish.step == step:
                inputs = {"prompt_token_ids": wish.prompt}
                try:
                    params = SamplingParams(**kinds(wish.sampling) | changes)
                    vllm_engine.add_request(str(index), inputs, params)
                except (VLLMValidationError, ValueError) as error:
                    found.refused[index] = str(error)
            if wish.abort == step:
                vllm_engine.abort_request([str(index)])
        last = step > asked[-1].step
        if len(found.steady) == turn and not last:
            inputs = {"prompt_token_ids": steady_prompt}
            vllm_engine.add_request(f"steady {turn}", inputs, steady)
            turn += 1
        for output in vllm_engine.step():
            if output.finished:
                keep(found, output)
        if last and not vllm_engine.has_unfinished_requests():
            return found
    raise AssertionError


def kinds(sampling: dict[str, Any]) -> dict[str, Any]:
    """As drawn, but a request gives its whole answer at the end, if not told else."""
    return {"output_kind": RequestOutputKind.FINAL_ONLY} | sampling


def keep(found: Found, output: RequestOutput) -> None:
    name, _, turn = output.request_id.partition(" ")
    if turn:
        found.steady.append(answers_of([output]))
    else:
        found.answers[int(name)] = answers_of([output])


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return tiny_chain_subject(tmp_path_factory.mktemp("chain"))


@pytest.mark.parametrize(
    ("seed", "number"),
    [
        (0, 200),
        *(pytest.param(seed, 500, marks=pytest.mark.slow) for seed in range(1, 9)),
    ],
)
def test_random_requests(seed: int, number: int, subject: Subject) -> None:
    asked = wishes(seed, number, subject.stream)
    settings = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 12}
    steady = subject.stream("steady", 40)
    with engine(subject.target, None, **settings) as llm:
        # vLLM answers such a request, but loses logprobs of those beside it.
        plain = play(llm, asked, steady, logprob_token_ids=None)
    with engine(subject.target, subject.spec, **settings) as llm:
        drafted = play(llm, asked, steady)
        counts = counters(llm)[0]

    for index, reason in drafted.refused.items():
        if index not in plain.refused:
            assert any(text in reason for text in OURS), (asked[index], reason)
        else:
            assert reason == plain.refused[index], asked[index]
    assert drafted.refused.keys() >= plain.refused.keys()
    compared = 0
    for index, wish in enumerate(asked):
        if index in drafted.refused or not wish.compares:
            continue
        compared += 1
        one, other = plain.answers[index], drafted.answers[index]
        assert len(one) == len(other)
        # Of a request whose grammar fails on its own tokens, vLLM gives no more.
        if not any(answer.finish_reason == "error" for answer in one):
            assert len(one) == wish.sampling.get("n", 1)
        for a, b in zip(one, other, strict=True):
            assert alike(a, b), (index, wish, a, b)
    for turns in (plain.steady, drafted.steady):
        assert len(turns) > number // 50
        assert all(alike(turn[0], plain.steady[0][0]) for turn in turns)
    # Else chance has left too little to say.
    assert compared > number // 3
    assert {bool(drafted.refused), bool(plain.refused)} == {True}
    assert 0 < counts.accepted_tokens < counts.draft_tokens


def test_every_field_that_matters_is_drawn() -> None:
    assert DRAWN.keys() == IN_RANDOM_REQUESTS
