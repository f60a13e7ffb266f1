# SPDX-License-Identifier: Apache-2.0
"""A run of ``vllm-mtp generate``: chunk by chunk, so that a killed run can go on.

The chunks' borders follow from the list of prompts alone, and a chunk is answered as a
whole or not at all. Which prompts are decoded together can decide a float tie, so only
because of this does a run that went on after a kill give an unbroken one's answers.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_mtp.data.render import Request
from vllm_mtp.data.store import Row, Store


@dataclass(frozen=True)
class Answer:
    """The target's answer to one request.

    Attributes:
        token_ids: With the token that ended it, if one did.
        finish_reason: ``"stop"`` or ``"length"``.
    """

    token_ids: list[int]
    finish_reason: str

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing but, at most, the token that ended it."""
        return len(self.token_ids) <= (self.finish_reason == "stop")


class Answerer(Protocol):
    """Answers requests; `data.answerer.VLLMAnswerer` is the one that uses vLLM."""

    def answer(
        self, requests: Sequence[Request], on_answer: Callable[[int], None]
    ) -> list[Answer]:
        """Answer all requests, in their order.

        Args:
            requests: One chunk.
            on_answer: Called with each answer's length as soon as it is there.
        """
        ...


def chunks(requests: Sequence[Request], size: int) -> list[Sequence[Request]]:
    """Cut a list of requests into chunks of ``size``; the last may be shorter."""
    return [requests[i : i + size] for i in range(0, len(requests), size)]


def answer_missing(
    store: Store,
    parts: Sequence[Sequence[Request]],
    answerer: Answerer,
    on_answer: Callable[[int], None],
    on_part: Callable[[int, float], None],
) -> None:
    """Answer every chunk that the store does not have yet.

    Args:
        store: Where the answers go.
        parts: All chunks.
        answerer: Answers them.
        on_answer: Called with each answer's length in tokens.
        on_part: Called after each chunk with its prompts and seconds.
    """
    for number, requests in enumerate(parts):
        if store.has_part(number):
            continue
        start = time.perf_counter()
        answers = answerer.answer(requests, on_answer)
        pairs = zip(requests, answers, strict=True)
        store.write_part(number, [row_of(*pair) for pair in pairs])
        on_part(len(requests), time.perf_counter() - start)


def row_of(request: Request, answer: Answer) -> Row:
    """Put a prompt and its answer together."""
    start = len(request.token_ids)
    end = start + len(answer.token_ids)
    return {
        "prompt_id": request.prompt_id,
        "category": request.category,
        "input_ids": [*request.token_ids, *answer.token_ids],
        "loss_spans": [] if answer.is_empty else [[start, end]],
        "finish_reason": answer.finish_reason,
    }
