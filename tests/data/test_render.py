# SPDX-License-Identifier: Apache-2.0
"""Prompts as the target's tokens: what is applied, refused, dropped and counted."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.conftest import ASSISTANT, BEGIN, END, USER, make_tokenizer
from vllm_mtp.data.odd_rows import OddRowError, OddRows
from vllm_mtp.data.prompts import Prompt, messages_of
from vllm_mtp.data.render import Renderer, prepare
from vllm_mtp.data.settings import PromptCounts
from vllm_mtp.errors import DataError


class FakeChat:
    """transformers' chat template, where `engine.FrontEnd` has vLLM's."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, vocab_size: int = 999
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] = (),
        arguments: Mapping[str, Any] | None = None,
        *,
        answered: bool = False,
    ) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools),
            tokenize=False,
            add_generation_prompt=not answered,
            **arguments or {},
        )


def chat_renderer(tokenizer: PreTrainedTokenizerFast, **arguments: Any) -> Renderer:
    return Renderer(FakeChat(tokenizer), arguments=arguments)


def raw_renderer(vocab_size: int = 999) -> Renderer:
    return Renderer(FakeChat(make_tokenizer(), vocab_size), chat_template=False)


def ids_of(renderer: Renderer, *prompts: Prompt) -> list[list[int]]:
    return [ids for _, ids in renderer.render(prompts, OddRows(strict=True))]


def prompt(text: str, category: str = "c", where: str = "here") -> Prompt:
    return Prompt(messages_of(text, where), category, where=where)


def conversation(*turns: tuple[str, str]) -> Prompt:
    return Prompt(
        tuple({"role": role, "content": content} for role, content in turns), "c"
    )


def test_the_chat_template_writes_the_special_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    renderer = chat_renderer(tokenizer)
    turns = conversation(("user", "a"), ("assistant", "b"), ("user", "é"))
    (short, long) = ids_of(renderer, prompt("hi"), turns)
    # Not a second <|begin|>, which the tokenizer puts in front of raw texts.
    assert tokenizer.decode(short) == f"{BEGIN}{USER}hi{END}{ASSISTANT}"
    assert tokenizer.decode(long) == (
        f"{BEGIN}{USER}a{END}{ASSISTANT}b{END}{USER}é{END}{ASSISTANT}"
    )
    assert renderer.chat_template_sha256 is not None


def test_tools_and_arguments_reach_the_template(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = "{{ tools[0].name }}{{ mood }}{{ messages[0].content }}"
    asked = Prompt(messages_of("x", "here"), "c", tools=({"name": "f"},))
    (found,) = ids_of(chat_renderer(tokenizer, mood="calm"), asked)
    assert tokenizer.decode(found) == "fcalmx"


def test_without_the_template_a_prompt_is_raw_text() -> None:
    renderer = raw_renderer()
    parts = Prompt(messages_of([{"role": "user", "content": ["a", "b"]}], ""), "c")
    found, joined = ids_of(renderer, prompt("hi"), parts)
    assert renderer.decode(found) == f"{BEGIN}hi"
    assert renderer.decode(joined) == f"{BEGIN}a\nb"
    assert renderer.chat_template_sha256 is None


def test_the_hash_tells_templates_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    before = chat_renderer(tokenizer).chat_template_sha256
    tokenizer.chat_template += " "
    assert chat_renderer(tokenizer).chat_template_sha256 != before


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(DataError, match="no chat template.*--no-chat-template"):
        chat_renderer(make_tokenizer())


def test_what_the_template_refuses_is_quoted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    renderer = chat_renderer(tokenizer)
    bad = conversation(("system", "be brief"), ("user", "a"))
    with pytest.raises(OddRowError, match="template refuses it: no system.*be brief"):
        ids_of(renderer, bad)
    odd = OddRows()
    assert len(list(renderer.render([bad, prompt("a"), bad], odd))) == 1
    assert odd.counts == {"the target's chat template refuses it": 2}


def test_turns_without_a_template_are_odd() -> None:
    turns = conversation(("user", "a"), ("assistant", "b"), ("user", "c"))
    with pytest.raises(OddRowError, match="with --no-chat-template: got 3 turns"):
        ids_of(raw_renderer(), turns)


def test_tokens_beyond_the_embedding_are_odd() -> None:
    """A token that was added to the tokenizer, and not to the model."""
    highest = max(make_tokenizer()("az")["input_ids"])
    odd = OddRows()
    for size, kept in ((highest + 1, 1), (highest, 0)):
        found = list(raw_renderer(size).render([prompt("az")], odd))
        assert len(found) == kept
    assert odd.counts == {"a token that the target has no embedding for": 1}


def test_duplicates_and_long_prompts_are_dropped_and_counted() -> None:
    read = [
        prompt("b", "first"),
        prompt("a"),
        prompt("b", "second"),
        prompt("12345678"),  # 9 tokens, with <|begin|>
        prompt("123456789", where="line 5"),
        prompt("123456789"),
        prompt("b", "third"),
    ]
    odd = OddRows()
    requests, counts = prepare(read, raw_renderer(), 9, odd)
    # The first of its kind, and in the source's order.
    lengths = [(request.category, len(request.token_ids)) for request in requests]
    assert lengths == [("first", 2), ("c", 2), ("c", 9)]
    assert counts == PromptCounts(read=7, duplicates_dropped=3, too_long_dropped=1)
    assert counts.kept == len(requests)
    assert odd.explained() == [
        "1 x too long (first: line 5: 10 tokens, --max-prompt-tokens is 9)"
    ]
    # Real data has long prompts, and --strict is to find faults in it.
    assert prepare(read, raw_renderer(), 9, OddRows(strict=True))[1] == counts


def test_a_prompt_without_any_token_is_odd(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = "{{ messages[0].content.strip('b') }}"
    odd = OddRows()
    read = [prompt("b"), prompt("a")]
    requests, counts = prepare(read, chat_renderer(tokenizer), 9, odd)
    assert [len(request.token_ids) for request in requests] == [1]
    assert (counts.read, counts.kept) == (2, 1)
    assert counts.odd_skipped == odd.counts == {"no token": 1}


def test_more_prompts_than_one_call_of_the_tokenizer_takes(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    many = [prompt(str(number)) for number in range(1200)]
    requests, _ = prepare(many, chat_renderer(tokenizer), 99, OddRows(strict=True))
    found = [tokenizer.decode(request.token_ids) for request in requests]
    assert found == [f"{BEGIN}{USER}{n}{END}{ASSISTANT}" for n in range(1200)]
