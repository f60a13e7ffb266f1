# SPDX-License-Identifier: Apache-2.0
"""A run of ``vllm-mtp generate``: a queue of prompts, and their answers as they end.

Answers are stored in the order in which they end, and put into the prompts' order once
all are there, so neither that order nor a kill changes the data set, up to float ties:
one may fall otherwise with other prompts beside it, and which these are hangs on what
was answered before a kill. Both tokens of a tie are the target's.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
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

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        """Answer all requests, as many at once as the engine decodes.

        Args:
            requests: Begun in their order.

        Yields:
            Each request with its answer, as soon as that has ended.
        """
        ...


def answer_missing(
    store: Store,
    requests: Sequence[Request],
    answerer: Answerer,
    part_rows: int,
    on_answer: Callable[[Request, int], None],
) -> None:
    """Answer requests, and store what has ended in parts.

    A kill loses at most what the engine is at, and one part that is not written; any
    other end, such as Ctrl-C, only the first.

    Args:
        store: Where the answers go.
        requests: Those that it does not have yet.
        answerer: Answers them.
        part_rows: Rows of a part; the last one may have fewer.
        on_answer: Called with each request and its answer's length in tokens.
    """
    rows: list[Row] = []
    try:
        for request, answer in answerer.answers(requests):
            rows.append(row_of(request, answer))
            on_answer(request, len(answer.token_ids))
            if len(rows) == part_rows:
                whole, rows = rows, []
                store.write_part(whole)
    finally:
        if rows:
            store.write_part(rows)


def row_of(request: Request, answer: Answer) -> Row:
    """Put a prompt and its answer together."""
    start = len(request.token_ids)
    end = start + len(answer.token_ids)
    return {
        "prompt_id": request.prompt_id,
        "split_id": request.split_on or request.prompt_id,
        "category": request.category,
        "input_ids": [*request.token_ids, *answer.token_ids],
        "loss_spans": [] if answer.is_empty else [[start, end]],
        "finish_reason": answer.finish_reason,
    }
