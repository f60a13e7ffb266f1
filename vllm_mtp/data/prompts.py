# SPDX-License-Identifier: Apache-2.0
"""Where prompts come from: a JSONL file, a Hugging Face dataset, or ShareGPT."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_mtp.data.settings import SourceSettings
from vllm_mtp.data.split import Message
from vllm_mtp.errors import DataError

_HF = "hf:"


@dataclass(frozen=True)
class Prompt:
    """A conversation that the target shall answer; the last turn is the user's."""

    messages: tuple[Message, ...]
    category: str


def read_prompts(source: SourceSettings) -> Iterator[Prompt]:
    """Yield a source's prompts in its order, from ``skip`` on, up to ``limit``.

    Raises:
        DataError: The source cannot be read; the message names the file and line,
            or the dataset and column.
        DemoPackageError: ShareGPT's package is missing.
    """
    if source.prompts == "sharegpt":
        return _sharegpt(source)
    found = _hf_rows(source) if source.prompts.startswith(_HF) else _jsonl_rows(source)
    stop = None if source.limit is None else source.skip + source.limit
    return islice(found, source.skip, stop)


def _sharegpt(source: SourceSettings) -> Iterator[Prompt]:
    from vllm_mtp.data.sharegpt import every_sharegpt_prompt

    stop = None if source.limit is None else source.skip + source.limit
    for text in islice(every_sharegpt_prompt(), source.skip, stop):
        yield Prompt(({"role": "user", "content": text},), "sharegpt")


def _jsonl_rows(source: SourceSettings) -> Iterator[Prompt]:
    path = Path(source.prompts).expanduser()
    if not path.is_file():
        raise DataError(
            f"--prompts {source.prompts}: no such file; expected a JSONL file, "
            "hf:NAME_OR_PATH for a Hugging Face dataset, or sharegpt"
        )
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _of_line(line, path, number)


def _of_line(line: bytes, path: Path, number: int) -> Prompt:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{where}: not JSON ({error}); expected one object per line"
        ) from None
    fields = row if isinstance(row, dict) else {}
    given = [key for key in ("prompt", "messages") if key in fields]
    if len(given) != 1:
        raise DataError(
            f'{where}: expected an object with either "prompt" (a text) or "messages" '
            f"(a list of turns), got {_short(row)}"
        )
    category = row.get("category")
    return Prompt(
        messages_of(row[given[0]], f'{where}, "{given[0]}"'),
        path.stem if category is None else str(category),
    )


def _hf_rows(source: SourceSettings) -> Iterator[Prompt]:
    rows = _hf_dataset(source)
    name = source.prompts.removeprefix(_HF).rstrip("/").rsplit("/", 1)[-1]
    for key in (source.column, source.category_column):
        if key is not None and key not in rows.column_names:
            raise DataError(
                f"{source.prompts}: no column {key!r}; it has {rows.column_names}. "
                "Choose with --prompts-column and --prompts-category-column"
            )
    for number, row in enumerate(rows):
        where = f"{source.prompts}, row {number}, column {source.column!r}"
        kind = row[source.category_column] if source.category_column else None
        category = name if kind is None else str(kind)
        yield Prompt(messages_of(row[source.column], where), category)


def _hf_dataset(source: SourceSettings) -> Any:
    """Load one split, from a folder of ``save_to_disk`` or from the hub."""
    import datasets

    name = source.prompts.removeprefix(_HF)
    folder = Path(name).expanduser()
    saved = ("dataset_dict.json", "state.json")
    try:
        if any((folder / file).is_file() for file in saved):
            found = datasets.load_from_disk(str(folder))
            return found[source.split] if isinstance(found, Mapping) else found
        return datasets.load_dataset(name, split=source.split)
    except Exception as error:  # the library raises many kinds
        raise DataError(
            f"--prompts {source.prompts}: split {source.split!r} could not be loaded "
            f"({type(error).__name__}: {error}); check the name and --prompts-split"
        ) from None


def messages_of(value: Any, where: str) -> tuple[Message, ...]:
    """Check a prompt: a text, or turns of which the last is the user's.

    Args:
        value: What the source holds.
        where: Its place, for messages.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value or not all(map(_is_turn, value)):
        raise DataError(
            f'{where}: expected a text or a list of {{"role": text, "content": text}}, '
            f"got {_short(value)}"
        )
    if value[-1]["role"] != "user":
        raise DataError(
            f"{where}: the last turn must be the user's, got one of "
            f"{value[-1]['role']!r}; leave the answer out"
        )
    for turn in value:
        _require_encodable(turn["content"], where)
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in value)


def _require_encodable(text: str, where: str) -> None:
    """JSON can spell halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half of a character, {text[error.start : error.end]!r}, at "
            f"position {error.start} (an emoji cut in two?); repair or remove "
            "the prompt"
        ) from None


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
