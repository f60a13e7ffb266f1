# SPDX-License-Identifier: Apache-2.0
"""A prompt's hash, and what follows from it alone: its side of the split, its seed."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, TypedDict


class _Turn(TypedDict):
    role: str
    content: Any  # a text, or a list of parts that are texts


class Message(_Turn, total=False):
    """One turn of a conversation, in OpenAI's form; a call of tools may have no
    content."""

    name: str
    tool_calls: list[Any]
    tool_call_id: str
    reasoning: str
    reasoning_content: str


def prompt_id(messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
    """Hash a prompt.

    The messages are hashed and not the rendered text: chat templates differ
    between targets, and some print today's date.

    Args:
        messages: The turns.
        tools: What the target may call.

    Returns:
        32 hex digits.
    """
    turns: list[Any] = [_hashed(message) for message in messages]
    if tools:
        turns.append({"tools": tools})
    text = json.dumps(turns, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def id_of_text(text: str) -> str:
    """`prompt_id` of one question."""
    return prompt_id([{"role": "user", "content": text}])


def _hashed(message: Message) -> list[Any]:
    more = {k: v for k, v in message.items() if k not in ("role", "content")}
    return [message["role"], message["content"], *([more] if more else [])]


def is_held_out(identifier: str, fraction: float) -> bool:
    """Tell a prompt's side of the split.

    It follows from the prompt alone, so a prompt is on the same side in every
    data set; with a larger fraction, those held out before still are. Of one that has
    text of another prompt it follows from that one (`Prompt.split_on`).

    Args:
        identifier: What `prompt_id` gave.
        fraction: Part of all prompts to hold out, 0 to 1.
    """
    return int(identifier[:16], 16) < fraction * 2**64


def prompt_seed(seed: int, identifier: str) -> int:
    """Seed to sample one prompt's answer with, 0 to 2**62 - 1.

    It depends on nothing but the run's seed and the prompt, so order and
    batching do not matter.
    """
    digest = hashlib.sha256(f"{seed}:{identifier}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def digest_of(identifiers: Sequence[str]) -> str:
    """Hash a list of prompts in their order: 64 hex digits."""
    return hashlib.sha256("\n".join(identifiers).encode()).hexdigest()
