# SPDX-License-Identifier: Apache-2.0
"""What a row of the matrix lets an engine do."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count, cycle, islice
from typing import Any

import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind

from tests.serving.lossless.subjects import MAX_MODEL_LEN, Prompts, Subject
from tests.tiny_tokenizer import THINK
from vllm_mtp.serving.requests import MOST_DRAFTS


@dataclass(frozen=True)
class Answer:
    """All that a user sees of one answer."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: Any = None
    prompt_logprobs: Any = None
    num_tokens: int = 0  # with the prompt's


@dataclass(frozen=True)
class Stage:
    """One engine, with the row's subject."""

    llm: LLM
    subject: Subject

    def params(self, **sampling: Any) -> SamplingParams:
        """Greedy, of the subject's length, unless told otherwise."""
        # Only logprobs can prove a tie.
        ties = {"logprobs": 5} if self.subject.tie_margin else {}
        usual = {"temperature": 0.0, "max_tokens": self.subject.max_tokens}
        return SamplingParams(**usual | {"ignore_eos": True} | ties | sampling)

    def ask(self, prompts: Prompts, **sampling: Any) -> list[Answer]:
        """Ask at once; vLLM batches as many as it may."""
        return answers_of(
            self.llm.generate(
                as_inputs(prompts), self.params(**sampling), use_tqdm=False
            )
        )


Play = Callable[[Stage], list[Answer]]


def as_inputs(prompts: Prompts) -> list[Any]:
    """Token ids in vLLM's form."""
    return [{"prompt_token_ids": ids} for ids in prompts]


def answers_of(outputs: Iterable[RequestOutput]) -> list[Answer]:
    """Every answer of every request, in order."""
    return [
        Answer(
            tuple(one.token_ids),
            one.text,
            one.finish_reason,
            one.stop_reason,
            one.logprobs,
            output.prompt_logprobs,
            len(output.prompt_token_ids or ()) + len(one.token_ids),
        )
        for output in outputs
        for one in output.outputs
    ]


def ask(name: str, lengths: Sequence[int] = (), **sampling: Any) -> Play:
    """All prompts at once, with these sampling parameters."""
    return lambda stage: stage.ask(stage.subject.prompts(name, lengths), **sampling)


def rounds(number: int, name: str, **sampling: Any) -> Play:
    """As `ask`, with other prompts each time: for answers that hardly draft."""

    def play(stage: Stage) -> list[Answer]:
        every = [f"{name} {count}" for count in range(number)]
        return [
            answer
            for prompts in map(stage.subject.prompts, every)
            for answer in stage.ask(prompts, **sampling)
        ]

    return play


def crowd(name: str) -> Play:
    """More at once than the cache of an engine with few blocks can hold."""
    return lambda stage: stage.ask(
        stage.subject.prompts(name, stage.subject.crowd_lengths),
        max_tokens=stage.subject.crowd_tokens,
    )


def batches(size: int) -> Play:
    """``size`` prompts at a time."""

    def play(stage: Stage) -> list[Answer]:
        left = iter(stage.subject.prompts(f"batches of {size}"))
        answers: list[Answer] = []
        while batch := list(islice(left, size)):
            answers += stage.ask(batch)
        return answers

    return play


def twice(name: str, lengths: Sequence[int] = (), **sampling: Any) -> Play:
    """The second time, the prompts are found in the prefix cache."""

    def play(stage: Stage) -> list[Answer]:
        prompts = stage.subject.prompts(name, lengths)
        # In fours, so that few blocks are thrown out in between.
        fours = [prompts[i : i + 4] for i in range(0, len(prompts), 4)]
        return [
            a for four in fours for _ in range(2) for a in stage.ask(four, **sampling)
        ]

    return play


def turns(stage: Stage) -> list[Answer]:
    """Conversations of three turns: each begins with all that was said before."""
    said = stage.subject.prompts("turns", (20, 33, 64, 50))
    answers: list[Answer] = []
    for turn in range(3):
        answers += stage.ask(said, max_tokens=16)
        replies = stage.subject.prompts(f"turn {turn}", (9, 16, 31))
        said = [
            text + list(answer.token_ids) + reply
            for text, answer, reply in zip(
                said, answers[-len(said) :], replies, strict=True
            )
        ]
    return answers


def reset_in_between(stage: Stage) -> list[Answer]:
    """The prefix cache is emptied between two rounds."""
    prompts = stage.subject.prompts("reset")
    answers = stage.ask(prompts)
    assert stage.llm.reset_prefix_cache()
    return answers + stage.ask(prompts)


def arrivals(stage: Stage) -> list[Answer]:
    """A request every second step, of various lengths: they come and go mid-flight."""
    prompts = stage.subject.prompts("arrivals")
    limits = [1 + 7 * number % 40 for number in range(len(prompts))]
    requests = [
        (2 * number, prompt, stage.params(max_tokens=limit))
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    return drive(stage.llm, requests, {})


def aborts(stage: Stage) -> list[Answer]:
    """Every third request is aborted: waiting, in its prompt, or while it decodes."""
    prompts = stage.subject.prompts("aborts")
    requests = [
        (number // 2, ids, stage.params()) for number, ids in enumerate(prompts)
    ]
    aborted = {
        number: number // 2 + 1 + number % 11 for number in range(0, len(prompts), 3)
    }
    return drive(stage.llm, requests, aborted)


def drive(
    llm: LLM,
    requests: Sequence[tuple[int, list[int], SamplingParams]],
    aborted: dict[int, int],
) -> list[Answer]:
    """Add and abort requests before given steps.

    Args:
        llm: An engine in this process, so that a call is a step.
        requests: Step, prompt and parameters of each.
        aborted: By the request's index, the step before which it ends.

    Returns:
        The answers of those that were not aborted, in the requests' order.
    """
    engine, done = llm.llm_engine, {}
    last = max(step for step, _, _ in requests)
    for step in count():
        for number, (start, ids, params) in enumerate(requests):
            if start == step:
                engine.add_request(str(number), {"prompt_token_ids": ids}, params)
        engine.abort_request([str(n) for n, end in aborted.items() if end == step])
        done |= {int(o.request_id): o for o in engine.step() if o.finished}
        if step >= last and not engine.has_unfinished_requests():
            break
    kept = [number for number in range(len(requests)) if number not in aborted]
    return answers_of(done[number] for number in kept)


def streamed(stage: Stage) -> list[Answer]:
    """Answers that come in pieces, as a server streams them."""
    engine = stage.llm.llm_engine
    prompts = stage.subject.prompts("streamed")
    for number, inputs in enumerate(as_inputs(prompts)):
        params = stage.params(
            output_kind=RequestOutputKind.DELTA,
            stream_interval=1 + number % 3,
            logprobs=2,
        )
        engine.add_request(str(number), inputs, params)
    pieces: dict[int, list[RequestOutput]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            pieces.setdefault(int(output.request_id), []).append(output)
    return [_joined(pieces[number]) for number in range(len(prompts))]


def _joined(pieces: Sequence[RequestOutput]) -> Answer:
    parts = [piece.outputs[0] for piece in pieces]
    return Answer(
        tuple(token for part in parts for token in part.token_ids),
        "".join(part.text for part in parts),
        parts[-1].finish_reason,
        parts[-1].stop_reason,
        [logprobs for part in parts for logprobs in part.logprobs],
    )


def drafts_by_request(stage: Stage) -> list[Answer]:
    """Requests that ask for fewer drafts, or for none; without the method, nobody
    reads what they say."""
    prompts = stage.subject.prompts("drafts by request")
    numbers = range(stage.subject.num_draft_tokens + 1)
    params = [
        stage.params(extra_args={MOST_DRAFTS: wanted})
        for _, wanted in zip(prompts, cycle(numbers))
    ]
    return answers_of(stage.llm.generate(as_inputs(prompts), params, use_tqdm=False))


def mixed_sampling(stage: Stage) -> list[Answer]:
    """Greedy and sampled requests in one batch; the greedy ones are compared."""
    prompts = stage.subject.prompts("mixed sampling")
    hot = [
        stage.params(temperature=0.4 + 0.7 * (number % 3), top_p=0.9, seed=number)
        for number in range(len(prompts))
    ]
    every = [p for number in range(len(prompts)) for p in (stage.params(), hot[number])]
    doubled = [ids for ids in prompts for _ in range(2)]
    outputs = stage.llm.generate(as_inputs(doubled), every, use_tqdm=False)
    return answers_of(outputs[::2])


def thinking(free: int | None, **sampling: Any) -> Play:
    """Requests that think from the start, or may begin to, most within a budget.

    Args:
        free: Budget of the others. The target alone leaves a budget to a request
            without one that takes its row (docs/upstream): None only where all end at
            once.
        sampling: Of all.
    """

    def play(stage: Stage) -> list[Answer]:
        tokenizer = stage.llm.get_tokenizer()
        think = tokenizer.convert_tokens_to_ids(THINK)
        names = ("thinking", "thinking 2")
        every = [ids for name in names for ids in stage.subject.prompts(name)]
        prompts = [ids + [think] * (number % 4 > 0) for number, ids in enumerate(every)]
        params = [
            stage.params(**sampling, thinking_token_budget=budget)
            for _, budget in zip(prompts, cycle((0, 1, 3, 5, free, 8, 20, 0, 12)))
        ]
        return answers_of(
            stage.llm.generate(as_inputs(prompts), params, use_tqdm=False)
        )

    return play


def beams(stage: Stage) -> list[Answer]:
    """vLLM's beam search, which asks for one token at a time."""
    from vllm.sampling_params import BeamSearchParams

    outputs = stage.llm.beam_search(
        as_inputs(stage.subject.prompts("beams")),
        BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True),
    )
    return [
        Answer(tuple(beam.tokens), beam.text or "", beam.finish_reason, None)
        for output in outputs
        for beam in output.sequences
    ]


def embedded(stage: Stage) -> list[Answer]:
    """Prompts given as embeddings."""
    prompts = stage.subject.prompts("embedded")
    embeddings = stage.llm.apply_model(
        lambda model: [model.embed_input_ids(torch.tensor(ids)) for ids in prompts]
    )[0]
    inputs: list[Any] = [{"prompt_embeds": rows.detach()} for rows in embeddings]
    return answers_of(stage.llm.generate(inputs, stage.params(), use_tqdm=False))


def near_the_limit(stage: Stage) -> list[Answer]:
    """Each round one, some or all requests reach ``max_model_len``."""
    one = (MAX_MODEL_LEN - 5, 20, 30, 40, 50, 60, 70, 80)
    some = (MAX_MODEL_LEN - 9, 20, MAX_MODEL_LEN - 1, 33)
    every = tuple(MAX_MODEL_LEN - 1 - left for left in range(16))
    rounds = (("one", one), ("some", some), ("every", every))
    prompts = [stage.subject.prompts(f"{how} at limit", ls) for how, ls in rounds]
    return [answer for batch in prompts for answer in stage.ask(batch)]
