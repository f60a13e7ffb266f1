# SPDX-License-Identifier: Apache-2.0
"""Prompts as the target's tokens: what is applied, refused, dropped and counted."""

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.conftest import ASSISTANT, BEGIN, END, USER, make_tokenizer
from vllm_mtp.data.prompts import Prompt, messages_of
from vllm_mtp.data.render import Renderer, prepare
from vllm_mtp.data.settings import PromptCounts
from vllm_mtp.errors import DataError


def prompt(text: str, category: str = "c") -> Prompt:
    return Prompt(messages_of(text, "here"), category)


def conversation(*turns: tuple[str, str]) -> Prompt:
    return Prompt(
        tuple({"role": role, "content": content} for role, content in turns), "c"
    )


def test_the_chat_template_writes_the_special_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    renderer = Renderer(tokenizer, chat_template=True)
    turns = conversation(("user", "a"), ("assistant", "b"), ("user", "é"))
    (short, long) = renderer.render([prompt("hi"), turns])
    # Not a second <|begin|>, which the tokenizer puts in front of raw texts.
    assert tokenizer.decode(short) == f"{BEGIN}{USER}hi{END}{ASSISTANT}"
    assert tokenizer.decode(long) == (
        f"{BEGIN}{USER}a{END}{ASSISTANT}b{END}{USER}é{END}{ASSISTANT}"
    )
    assert renderer.chat_template_sha256 is not None


def test_without_the_template_a_prompt_is_raw_text() -> None:
    tokenizer = make_tokenizer()
    renderer = Renderer(tokenizer, chat_template=False)
    (found,) = renderer.render([prompt("hi")])
    assert tokenizer.decode(found) == f"{BEGIN}hi"
    assert renderer.chat_template_sha256 is None


def test_the_hash_tells_templates_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    before = Renderer(tokenizer, chat_template=True).chat_template_sha256
    tokenizer.chat_template += " "
    assert Renderer(tokenizer, chat_template=True).chat_template_sha256 != before


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(DataError, match="no chat template.*--no-chat-template"):
        Renderer(make_tokenizer(), chat_template=True)


def test_turns_without_a_template_are_refused() -> None:
    renderer = Renderer(make_tokenizer(), chat_template=False)
    turns = conversation(("user", "a"), ("assistant", "b"), ("user", "c"))
    with pytest.raises(DataError, match="--no-chat-template: got a prompt of 3 turns"):
        list(renderer.render([turns]))


def test_what_the_template_refuses_is_quoted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    renderer = Renderer(tokenizer, chat_template=True)
    bad = conversation(("system", "be brief"), ("user", "a"))
    with pytest.raises(DataError, match="no system turns.*be brief.*remove it"):
        list(renderer.render([bad]))


def test_duplicates_and_long_prompts_are_dropped_and_counted() -> None:
    renderer = Renderer(make_tokenizer(), chat_template=False)
    read = [
        prompt("b", "first"),
        prompt("a"),
        prompt("b", "second"),
        prompt("12345678"),  # 9 tokens, with <|begin|>
        prompt("123456789"),
        prompt("123456789"),
        prompt("b", "third"),
    ]
    requests, counts = prepare(read, renderer, max_prompt_tokens=9)
    # The first of its kind, and in the source's order.
    lengths = [(request.category, len(request.token_ids)) for request in requests]
    assert lengths == [("first", 2), ("c", 2), ("c", 9)]
    assert counts == PromptCounts(read=7, duplicates_dropped=3, too_long_dropped=1)
    assert counts.kept == len(requests)


def test_a_prompt_without_any_token_is_dropped(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}"
    renderer = Renderer(tokenizer, chat_template=True)
    requests, counts = prepare([prompt(""), prompt("a")], renderer, 9)
    assert [len(request.token_ids) for request in requests] == [1]
    assert (counts.too_long_dropped, counts.kept) == (1, 1)


def test_more_prompts_than_one_call_of_the_tokenizer_takes(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    renderer = Renderer(tokenizer, chat_template=True)
    many = [prompt(str(number)) for number in range(1200)]
    requests, _ = prepare(many, renderer, 99)
    found = [tokenizer.decode(request.token_ids) for request in requests]
    assert found == [f"{BEGIN}{USER}{n}{END}{ASSISTANT}" for n in range(1200)]
