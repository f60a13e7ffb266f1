# SPDX-License-Identifier: Apache-2.0
"""What a target's chat template puts around a user's text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_mtp.errors import DataError, in_one_line

# Letters alone, so that a template that trims or escapes writes them as they are.
_SENTINELS = ("Qzvkxjwqhb", "Wjxqbzkfvg", "Hkqzwxvjfd")
_LEAST_MARKER = 3  # characters

Render = Callable[[Sequence[Mapping[str, Any]]], str | list[int]]


@dataclass(frozen=True)
class UserTurn:
    """A user's turn, the first one of a conversation.

    Attributes:
        before: All that the target reads before the user's text, but for a last space.
        markers: Texts by which the template tells turns apart, such as
            ``<|im_start|>assistant``; no user writes them.
    """

    before: str
    markers: frozenset[str]


def user_turn(render: Render) -> UserTurn:
    """Derive it from the chat template: render a known text, and cut at it.

    Args:
        render: Renders a conversation, with what follows before an answer.

    Raises:
        DataError: It cannot be cut: the template refuses a plain question, leaves its
            text out or says it twice, or writes other things around other texts.
    """
    found = {_around(render, text) for text in _SENTINELS}
    if len(found) != 1:
        raise _uncut("it writes different things around different texts")
    ((before, behind),) = found
    if not before.strip():
        raise _uncut("it writes nothing before a user's text")
    # Of what stands before, only the last line: a system prompt may come first.
    last = before.rstrip().rsplit("\n", 1)[-1]
    # A space belongs to the token of the word behind it.
    before = before.rstrip(" ")
    return UserTurn(before, _markers([last, behind, *_between(render)]))


def _around(render: Render, text: str) -> tuple[str, str]:
    try:
        whole = render([{"role": "user", "content": text}])
    except Exception as error:  # jinja and vLLM raise many kinds
        raise _uncut(f"it refuses a plain question ({in_one_line(error)})") from None
    if not isinstance(whole, str):
        raise _uncut(
            "this tokenizer (mistral-common) writes no text; use --tokenizer-mode hf, "
            "if the target's folder has files for it"
        )
    before, *behind = whole.split(text)
    if len(behind) != 1:
        raise _uncut(f"it writes a user's text {len(behind)} times")
    return before, behind[0]


def _between(render: Render) -> list[str]:
    """What the template writes between three turns; nothing where it takes just one."""
    roles = ("user", "assistant", "user")
    turns = [
        {"role": role, "content": text}
        for role, text in zip(roles, _SENTINELS, strict=True)
    ]
    try:
        left = str(render(turns))
    except Exception:  # as above
        return []
    found = []
    for text in _SENTINELS:
        before, _, left = left.partition(text)
        found.append(before)
    return found[1:]


def _markers(texts: Sequence[str]) -> frozenset[str]:
    lines = (line.strip() for text in texts for line in text.splitlines())
    return frozenset(
        line
        for line in lines
        # A line such as "user" is a word of prompts too.
        if len(line) >= _LEAST_MARKER and not line.replace(" ", "").isalnum()
    )


def _uncut(reason: str) -> DataError:
    return DataError(
        "--prompts self:N: the target's chat template does not tell where a user's "
        f"text begins: {reason}. Name a source with prompts"
    )
