# SPDX-License-Identifier: Apache-2.0
"""Prompts as the target's token ids, each once and none too long."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from vllm_mtp.data.odd_rows import OddRowError, OddRows
from vllm_mtp.data.prompts import Prompt, text_of
from vllm_mtp.data.settings import PromptCounts
from vllm_mtp.data.shard import Shard
from vllm_mtp.data.user_turn import UserTurn, user_turn
from vllm_mtp.errors import DataError

BATCH = 512  # prompts per call of the tokenizer, which then uses all cores
TOO_LONG = "too long"
ALL = Shard()


class Chat(Protocol):
    """What turns a conversation into the target's input; `engine.FrontEnd` does it as
    vLLM's chat endpoint."""

    tokenizer: Any

    @property
    def vocab_size(self) -> int:
        """Rows of the target's embedding."""
        ...

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] = (),
        arguments: Mapping[str, Any] | None = None,
        *,
        answered: bool = False,
    ) -> str | list[int]:
        """A text to tokenize without special tokens, or token ids."""
        ...


@dataclass(frozen=True)
class Request:
    """One prompt as the target reads it."""

    prompt_id: str
    category: str
    token_ids: list[int]
    split_on: str | None = None  # see `Prompt`


class Renderer:
    """Turns prompts into token ids.

    Args:
        chat: The target's.
        chat_template: Render conversations; False: prompts are raw text.
        arguments: Of the chat template, such as ``{"enable_thinking": False}``.

    Raises:
        DataError: The target has no chat template.
    """

    def __init__(
        self,
        chat: Chat,
        *,
        chat_template: bool = True,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self._chat = chat
        self._chat_template = chat_template
        self._arguments = dict(arguments or {})
        if chat_template:
            self._require_template()

    def _require_template(self) -> None:
        try:
            self._chat.render([{"role": "user", "content": "a"}], (), self._arguments)
        except Exception as error:  # jinja, vLLM and mistral-common raise many kinds
            if getattr(self._chat.tokenizer, "chat_template", None):
                return  # there is one, and it wants something else than a question
            raise DataError(
                "the target's tokenizer has no chat template (a base model?); use "
                "--no-chat-template to let it complete the prompts as raw text, or, "
                "for Mistral's own tokenizer files, --tokenizer-mode mistral, here and "
                f"for `vllm serve` ({_short(error)})"
            ) from None

    @property
    def chat_template_sha256(self) -> str | None:
        template = getattr(self._chat.tokenizer, "chat_template", None)
        if not self._chat_template or not template:
            return None
        return hashlib.sha256(str(template).encode()).hexdigest()

    def user_turn(self) -> UserTurn:
        """What the target reads around a user's text.

        Raises:
            DataError: It has no chat template, or none that tells.
        """
        if not self._chat_template:
            raise DataError(
                "--no-chat-template: with --prompts self:N the target is given what "
                "its chat template puts before a user's text; leave one of the two out"
            )
        return user_turn(lambda turns: self._chat.render(turns, (), self._arguments))

    @property
    def special_tokens(self) -> frozenset[str]:
        """Those that the tokenizer never makes of a user's words."""
        tokenizer = self._chat.tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        return frozenset(tokenizer.all_special_tokens).union(
            str(token) for token in added if token.special
        )

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a rendered text."""
        (found,) = self._tokenized([text])
        return found

    def decode(self, token_ids: Sequence[int]) -> str:
        """Token ids as text, special tokens included."""
        return self._chat.tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def token_ids_of(self, text: str) -> list[int]:
        """One question as the target gets it."""
        prompt = Prompt(({"role": "user", "content": text},), "")
        ((_, found),) = self.render([prompt], OddRows(strict=True))
        return found

    def render(
        self, prompts: Iterable[Prompt], odd: OddRows
    ) -> Iterator[tuple[Prompt, list[int]]]:
        """Yield each prompt that can be rendered with its token ids.

        Args:
            prompts: In their order.
            odd: Counts the others.
        """
        source = iter(prompts)
        # Templates write the special tokens themselves.
        special = not self._chat_template
        while batch := list(islice(source, BATCH)):
            rendered: list[tuple[Prompt, str | list[int]]] = []
            for prompt in batch:
                try:
                    rendered.append((prompt, self._rendered(prompt)))
                except OddRowError as error:
                    odd.skip(error)
            texts = [found for _, found in rendered if isinstance(found, str)]
            tokenized = iter(
                self._chat.tokenizer(texts, add_special_tokens=special)["input_ids"]
                if texts
                else ()
            )
            for prompt, found in rendered:
                ids = next(tokenized) if isinstance(found, str) else found
                if self._are_usable(ids, prompt, odd):
                    yield prompt, ids

    def render_answered(
        self, prompts: Iterable[Prompt], odd: OddRows
    ) -> Iterator[tuple[Prompt, list[int], list[int]]]:
        """Yield each answered prompt that can be rendered with the token ids of the
        prompt, as the chat endpoint makes them, and of what the template writes behind.

        Args:
            prompts: In their order, all at once.
            odd: Counts the others.
        """
        rendered: list[tuple[Prompt, str, str]] = []
        for prompt in prompts:
            try:
                rendered.append((prompt, *self._rendered_answer(prompt)))
            except OddRowError as error:
                odd.skip(error)
        starts, wholes = (
            self._tokenized([start + answer * whole for _, start, answer in rendered])
            for whole in (False, True)
        )
        for (prompt, _, text), ids, whole in zip(rendered, starts, wholes, strict=True):
            try:
                answer = self._answer_ids(ids, whole, text, prompt.where)
            except OddRowError as error:
                odd.skip(error)
                continue
            if self._are_usable([*ids, *answer], prompt, odd):
                yield prompt, ids, answer

    def _tokenized(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids = self._chat.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return list(map(list, ids))

    def _answer_ids(
        self, start: list[int], whole: list[int], text: str, where: str
    ) -> list[int]:
        """The tokens behind a prompt's, which stay what they are without an answer."""
        if whole[: len(start)] == start:
            return whole[len(start) :]
        # The last token of the prompt and the first of the answer would be one.
        (alone,) = self._tokenized([text])
        if self._chat.tokenizer.decode(alone) != text:
            raise OddRowError(
                "no tokens for the answer",
                where,
                f"{text[:80]!r} alone is tokenized as something else",
            )
        return alone

    def _rendered_answer(self, prompt: Prompt) -> tuple[str, str]:
        """The prompt, and what comes behind it."""
        start = self._rendered(prompt)
        turns = [*prompt.messages, *([prompt.answer] if prompt.answer else [])]
        try:
            whole = self._chat.render(
                turns, prompt.tools, self._arguments, answered=True
            )
        except Exception as error:  # as above
            raise OddRowError(
                "the target's chat template refuses the answer",
                prompt.where,
                f"{_short(error)}; it is {str(prompt.answer)[:100]!r}",
            ) from None
        if isinstance(start, str) and isinstance(whole, str):
            if whole.startswith(start):
                return start, whole[len(start) :]
            raise OddRowError(
                "the chat template does not write the answer behind its prompt",
                prompt.where,
                f"the prompt ends in {start[-60:]!r}, the conversation in "
                f"{whole[-60:]!r}; served, the target never says that there (does the "
                "template leave thinking out that the prompt begins, or do other "
                "--chat-template-kwargs fit?)",
            )
        raise DataError(
            "--answers given: this tokenizer (mistral-common) renders no conversation "
            "that has ended; use --tokenizer-mode hf, if the target's folder has files "
            "for it"
        )

    def _rendered(self, prompt: Prompt) -> str | list[int]:
        messages = list(prompt.messages)
        if self._chat_template:
            try:
                return self._chat.render(messages, prompt.tools, self._arguments)
            except Exception as error:  # as above
                raise OddRowError(
                    "the target's chat template refuses it",
                    prompt.where,
                    f"{_short(error)}; the prompt begins with {str(messages)[:100]!r}",
                ) from None
        if len(messages) > 1 or prompt.tools:
            raise OddRowError(
                "several turns or tools, with --no-chat-template",
                prompt.where,
                f"got {len(messages)} turns, expected one text; leave the flag out, or "
                "use prompts of one turn",
            )
        return text_of(messages[0]["content"])

    def _are_usable(self, ids: Sequence[int], prompt: Prompt, odd: OddRows) -> bool:
        if not ids:
            error = OddRowError("no token", prompt.where, "the prompt is empty")
        elif max(ids) >= self._chat.vocab_size:
            error = OddRowError(
                "a token that the target has no embedding for",
                prompt.where,
                f"got the id {max(ids)}, the embedding has {self._chat.vocab_size} "
                "rows; the tokenizer is another model's, or has tokens added to it",
            )
        else:
            return True
        odd.skip(error)
        return False


def prepare(
    prompts: Iterable[Prompt],
    renderer: Renderer,
    max_prompt_tokens: int,
    odd: OddRows,
    shard: Shard = ALL,
) -> tuple[list[Request], PromptCounts]:
    """Render prompts, and drop duplicates and those that cannot be used.

    Args:
        prompts: Read with the same ``odd``.
        renderer: Of the target.
        max_prompt_tokens: Longer ones are dropped.
        odd: Counts what is dropped, but for duplicates.
        shard: The part to take; only its prompts are rendered.

    Returns:
        The requests in the source's order, and what was dropped.
    """
    read = 0
    seen: set[str] = set()
    kept = []
    for prompt in prompts:
        read += 1
        if prompt.identifier in seen:
            continue  # of duplicates the first one stays, in its place
        if shard.holds(len(seen)):
            kept.append(prompt)
        seen.add(prompt.identifier)
    requests = []
    for prompt, ids in renderer.render(kept, odd):
        if len(ids) <= max_prompt_tokens:
            requests.append(
                Request(prompt.identifier, prompt.category, ids, prompt.split_on)
            )
        else:
            detail = f"{len(ids)} tokens, --max-prompt-tokens is {max_prompt_tokens}"
            odd.note(OddRowError(TOO_LONG, prompt.where, detail))
    skipped = odd.counts
    too_long = skipped.pop(TOO_LONG, 0)
    duplicates, others = read - len(seen), len(seen) - len(kept)
    left_out = duplicates + others + too_long + sum(skipped.values())
    return requests, PromptCounts(
        read=len(requests) + left_out,
        in_other_shards=others,
        duplicates_dropped=duplicates,
        too_long_dropped=too_long,
        odd_skipped=skipped,
    )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
