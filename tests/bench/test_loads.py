# SPDX-License-Identifier: Apache-2.0
"""What a benchmark asks of the servers."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_mtp.bench.loads import (
    CATEGORY,
    CONCURRENCY,
    CONTEXT,
    category_loads,
    concurrency_loads,
    context_loads,
)
from vllm_mtp.errors import MTPError


class Words:
    """A tokenizer whose tokens are words."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        assert not add_special_tokens
        start = len(self.words)
        self.words += text.split()
        return SimpleNamespace(input_ids=list(range(start, len(self.words))))

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)


PROMPTS = ["first question?", "second question?", "some text", "and more of it"]


def test_twice_as_many_prompts_as_are_at_once() -> None:
    loads = concurrency_loads(PROMPTS, [1, 2], 3, 8, "here")
    assert [(load.concurrency, len(load.prompts)) for load in loads] == [(1, 3), (2, 4)]
    assert {load.varies for load in loads} == {CONCURRENCY}
    with pytest.raises(MTPError, match="--prompts here: got 4 prompts, expected 6"):
        concurrency_loads(PROMPTS, [3], 2, 8, "here")


@pytest.mark.parametrize("size", [0, 10, 40, 100])
def test_contexts_are_as_long_as_they_say(size: int) -> None:
    (load,) = context_loads(Words(), PROMPTS, [size], 8)
    assert (load.concurrency, load.varies) == (1, CONTEXT)
    for prompt, question in zip(load.prompts, PROMPTS[:2], strict=True):
        asked = 7 + 2  # "That was the text. Now answer this:" and the question
        assert len(prompt.split()) == max(size, asked)
        assert prompt.endswith(question)
        assert "question" not in prompt.removesuffix(question)
    assert size <= 10 or load.prompts[0][:9] != load.prompts[1][:9]


def test_a_load_for_each_category() -> None:
    loads = category_loads({"sql": PROMPTS, "code": PROMPTS[:1]}, 2, 8)
    assert [(load.name, len(load.prompts)) for load in loads] == [
        ("sql", 2),
        ("code", 1),
    ]
    assert {load.varies for load in loads} == {CATEGORY}


def test_the_file_of_unseen_prompts_has_categories() -> None:
    from vllm_mtp.cli.bench import _read

    found = _read(str(Path("examples/prompts/unseen.jsonl")))
    assert len({category for category, _ in found}) > 3
