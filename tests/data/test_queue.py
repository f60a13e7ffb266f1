# SPDX-License-Identifier: Apache-2.0
"""The engine is kept full, and what has ended is kept."""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.full_disk import no_file_above
from vllm_mtp.data.answerer import VLLMAnswerer
from vllm_mtp.data.generation import Answer, answer_missing
from vllm_mtp.data.render import Request
from vllm_mtp.data.settings import SamplingSettings
from vllm_mtp.data.store import Store
from vllm_mtp.errors import OutputError

pytest.importorskip("vllm")

lengths = st.lists(st.integers(1, 20), max_size=40)


class OneTokenPerStep:
    """vLLM's engine, so far as a queue sees it; an answer's length is its prompt."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._left: dict[str, int] = {}
        self._wanted: dict[str, int] = {}
        self.sizes: list[int] = []

    def add_request(self, name: str, prompt: dict[str, Any], params: Any) -> None:
        assert name not in self._left
        self._left[name] = self._wanted[name] = prompt["prompt_token_ids"][0]

    def step(self) -> list[Any]:
        self.sizes.append(len(self._left))
        assert 0 < len(self._left) <= self._at_once
        self._left = {name: left - 1 for name, left in self._left.items()}
        ended = [name for name, left in self._left.items() if not left]
        return [self._output(name) for name in reversed(ended)]

    def _output(self, name: str) -> SimpleNamespace:
        del self._left[name]
        tokens = [7] * self._wanted[name]
        completion = SimpleNamespace(token_ids=tokens, finish_reason="length")
        return SimpleNamespace(request_id=name, outputs=[completion])


def requests(of: Iterable[int]) -> list[Request]:
    return [Request(f"{n:032x}", "", [length]) for n, length in enumerate(of)]


def run(engine: OneTokenPerStep, of: Sequence[Request], at_once: int) -> list[Request]:
    answerer = VLLMAnswerer(
        SimpleNamespace(llm_engine=engine), SamplingSettings(), at_once
    )
    ended = []
    for request, answer in answerer.answers(iter(of)):
        assert [len(answer.token_ids)] == request.token_ids
        ended.append(request)
    return ended


@given(lengths, st.integers(1, 8))
def test_no_place_is_empty_while_a_prompt_waits(of: list[int], at_once: int) -> None:
    engine = OneTokenPerStep(at_once)
    asked = requests(of)
    ended = run(engine, asked, at_once)
    assert sorted(ended, key=lambda request: request.prompt_id) == asked
    assert sum(engine.sizes) == sum(of)
    # Once a place stays empty nothing waits, so the sizes only fall from there on.
    assert engine.sizes == sorted(engine.sizes, reverse=True)
    full = [size for size in engine.sizes if size == at_once]
    assert len(engine.sizes) - len(full) <= max(of, default=0)


def test_fewer_steps_than_chunks_that_wait_for_their_longest() -> None:
    random.seed(0)
    of = [random.choice([2, 4, 8, 16, 256]) for _ in range(64)]
    chunked = sum(max(of[begin : begin + 8]) for begin in range(0, 64, 8))
    engine = OneTokenPerStep(8)
    run(engine, requests(of), 8)
    assert len(engine.sizes) < 0.5 * chunked


class Ending:
    """Answers that come one by one, and then something happens."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        for request in requests:
            yield request, Answer([1, 2], "length")
        raise self._error


@pytest.mark.parametrize("count", [0, 1, 4, 5, 7, 8])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the engine")])
def test_what_has_ended_is_written_whatever_ends_the_run(
    count: int, error: BaseException, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    with pytest.raises(type(error)):
        answer_missing(store, requests([3] * count), Ending(error), 4, lambda *_: None)
    prompts = {request.prompt_id: [3] for request in requests([3] * count)}
    assert store.answered(prompts) == set(prompts)
    assert len(list(tmp_path.glob("parts/*"))) == -(-count // 4)


class Endless:
    """Answers that never stop coming."""

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        for request in requests:
            yield request, Answer([1] * 500, "length")


def test_a_full_disk_ends_the_run_and_keeps_whole_parts(tmp_path: Path) -> None:
    store, asked = Store(tmp_path), requests([3] * 6)
    asked[4] = Request(asked[4].prompt_id, "", [5] * 900)
    done: list[int] = []
    with no_file_above(3500), pytest.raises(OutputError, match="cannot be written"):
        answer_missing(store, asked, Endless(), 2, lambda _, n: done.append(n))
    assert done == [500] * 6
    prompts = {request.prompt_id: request.token_ids for request in asked}
    assert store.answered(prompts) == {request.prompt_id for request in asked[:4]}


def test_an_interrupt_ends_the_queue_between_two_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = OneTokenPerStep(2)

    def stop_if_asked() -> None:
        if len(engine.sizes) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("vllm_mtp.data.answerer.stop_if_asked", stop_if_asked)
    with pytest.raises(KeyboardInterrupt):
        run(engine, requests([9] * 5), 2)
    assert engine.sizes == [2, 2, 2]
