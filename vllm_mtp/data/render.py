# SPDX-License-Identifier: Apache-2.0
"""Prompts as the target's token ids, each once and none too long."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vllm_mtp.data.prompts import Prompt
from vllm_mtp.data.settings import PromptCounts
from vllm_mtp.data.split import prompt_id
from vllm_mtp.errors import DataError

_BATCH = 512  # prompts per call of the tokenizer, which then uses all cores


@dataclass(frozen=True)
class Request:
    """One prompt as the target reads it."""

    prompt_id: str
    category: str
    token_ids: list[int]


class Renderer:
    """Turns prompts into token ids.

    Args:
        tokenizer: The target's.
        chat_template: Apply its chat template; False: prompts are raw text.

    Raises:
        DataError: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, *, chat_template: bool) -> None:
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "the target's tokenizer has no chat template (a base model?); use "
                "--no-chat-template to let it complete the prompts as raw text"
            )
        self._tokenizer = tokenizer
        self._chat_template = chat_template

    @property
    def chat_template_sha256(self) -> str | None:
        if not self._chat_template:
            return None
        template = str(self._tokenizer.chat_template)
        return hashlib.sha256(template.encode()).hexdigest()

    def render(self, prompts: Iterable[Prompt]) -> Iterator[list[int]]:
        """Yield the token ids of each prompt.

        Raises:
            DataError: The template refuses a prompt.
        """
        texts = map(self._text, prompts)
        # Templates write the special tokens themselves.
        special = not self._chat_template
        while batch := list(islice(texts, _BATCH)):
            yield from self._tokenizer(batch, add_special_tokens=special)["input_ids"]

    def _text(self, prompt: Prompt) -> str:
        messages = list(prompt.messages)
        if self._chat_template:
            try:
                return self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # jinja raises many kinds
                raise DataError(
                    f"the target's chat template refuses a prompt ({error}), which "
                    f"begins with {str(messages)[:100]!r}; remove it from the source"
                ) from None
        if len(messages) > 1:
            raise DataError(
                f"--no-chat-template: got a prompt of {len(messages)} turns, expected "
                "one text; leave the flag out, or use prompts of one turn"
            )
        return messages[0]["content"]


def prepare(
    prompts: Iterable[Prompt], renderer: Renderer, max_prompt_tokens: int
) -> tuple[list[Request], PromptCounts]:
    """Render prompts, and drop duplicates and those too long or without a token.

    Returns:
        The requests in the source's order, and what was dropped.
    """
    read = list(prompts)
    kept: dict[str, Prompt] = {}
    for prompt in read:
        # Of duplicates the first one stays, in its place.
        kept.setdefault(prompt_id(prompt.messages), prompt)
    rendered = zip(kept.items(), renderer.render(kept.values()), strict=True)
    requests = [
        Request(identifier, prompt.category, token_ids)
        for (identifier, prompt), token_ids in rendered
        if 0 < len(token_ids) <= max_prompt_tokens
    ]
    return requests, PromptCounts(
        read=len(read),
        duplicates_dropped=len(read) - len(kept),
        too_long_dropped=len(kept) - len(requests),
    )
