# SPDX-License-Identifier: Apache-2.0
"""A prompt's hash, and what follows from it alone: its side of the split, its seed."""

import hashlib
import json
from collections.abc import Sequence
from typing import TypedDict


class Message(TypedDict):
    """One turn of a conversation, in OpenAI's form."""

    role: str
    content: str


def prompt_id(messages: Sequence[Message]) -> str:
    """Hash a prompt.

    The messages are hashed and not the rendered text: chat templates differ
    between targets, and some print today's date.

    Returns:
        32 hex digits.
    """
    turns = [[message["role"], message["content"]] for message in messages]
    text = json.dumps(turns, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_held_out(identifier: str, fraction: float) -> bool:
    """Tell a prompt's side of the split.

    It follows from the prompt alone, so a prompt is on the same side in every
    data set; with a larger fraction, those held out before still are.

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
