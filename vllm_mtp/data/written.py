# SPDX-License-Identifier: Apache-2.0
"""Prompts that the target writes itself, as Magpie does (arXiv 2406.08464).

A chat model that is given what its chat template puts before a user's text, and no
text, goes on with one that a user may write: it was trained on many. Prompts are
sampled, each with a seed that follows from its number, and what is no prompt is left
out afterwards. They lie in the run's folder as they were written, so that a run that
goes on answers the same ones.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_mtp.data.generation import Answer
from vllm_mtp.data.odd_rows import OddRowError, OddRows
from vllm_mtp.data.prompts import Prompt
from vllm_mtp.data.render import Request
from vllm_mtp.data.settings import SamplingSettings, SourceSettings
from vllm_mtp.data.shard import Shard
from vllm_mtp.data.sharegpt import MAX_CHARS, MIN_CHARS
from vllm_mtp.data.sources import count_of_self
from vllm_mtp.data.user_turn import UserTurn
from vllm_mtp.errors import DataError
from vllm_mtp.files import write_whole, writing

WRITTEN_FILE = "written.jsonl"
CATEGORY = "self"
# Of the different runs of so many characters, less than this part: it repeats itself.
_RUN, _LEAST_DIFFERENT = 8, 0.5


class Written(BaseModel):
    """What the target wrote: a line of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    number: int = Field(ge=0, description="The prompt's.")
    text: str = Field(description="Special tokens included, but for the end's.")
    ended: bool = Field(description="Whether the target ended it.")


class Writer(Protocol):
    """`data.answerer.VLLMAnswerer`, told how to sample."""

    def answers(
        self, requests: Iterable[Request], sampling: SamplingSettings
    ) -> Iterator[tuple[Request, Answer]]:
        """See `data.generation.Answerer`."""
        ...


def numbers_of(source: SourceSettings) -> tuple[list[int], int]:
    """The numbers of a run's prompts, and how many are left to other shards.

    A shard takes every so many-th number, since none knows what another one writes.
    Equal texts of two shards can then not be told.
    """
    count = count_of_self(source.prompts)
    end = count if source.limit is None else min(count, source.skip + source.limit)
    all_numbers = range(source.skip, end)
    shard = Shard.parse(source.shard)
    own = [number for number in all_numbers if shard.holds(number)]
    return own, len(all_numbers) - len(own)


class WrittenFile:
    """The file of what was written: one object per line.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / WRITTEN_FILE

    def read(self) -> dict[int, Written]:
        """By number; empty where there is no file yet.

        Raises:
            DataError: It is something else; names the line.
        """
        if not self.path.is_file():
            return {}
        found: dict[int, Written] = {}
        # A kill may have cut the last line: what it said is written again.
        whole, _, _ = self.path.read_bytes().rpartition(b"\n")
        for place, line in enumerate(whole.splitlines(), 1):
            try:
                one = Written.model_validate_json(line)
                found[one.number] = one
            except ValidationError:
                raise DataError(
                    f"{self.path}, line {place}: not what `vllm-mtp generate` wrote; "
                    "name another folder as --out (prompts that are written again may "
                    "be others than those that have answers)"
                ) from None
        return found

    def write(self, found: Iterable[Written]) -> None:
        """In place of what is there."""
        write_whole(self.path, _lines(found))

    def add(self, more: Iterable[Written]) -> None:
        """Behind what is there."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_lines(more))
            file.flush()
            os.fsync(file.fileno())


def _lines(some: Iterable[Written]) -> str:
    return "".join(f"{one.model_dump_json()}\n" for one in some)


def write_missing(
    file: WrittenFile,
    missing: Iterable[int],
    before: Sequence[int],
    writer: Writer,
    sampling: SamplingSettings,
    decode: Callable[[Sequence[int]], str],
    part: int,
    on_prompt: Callable[[], Any],
) -> dict[int, Written]:
    """Have the target write prompts that the file does not have.

    Args:
        file: A kill loses at most what the engine is at, and ``part``.
        missing: Their numbers.
        before: Token ids that the target is given.
        writer: The engine.
        sampling: How it writes.
        decode: Token ids to text, special tokens included.
        part: Prompts that are kept at once.
        on_prompt: Called for each that has been written.

    Returns:
        They, by number.
    """
    requests = (
        Request(f"self:{number}", str(number), list(before)) for number in missing
    )
    found: list[Written] = []
    kept = 0
    try:
        for request, answer in writer.answers(requests, sampling):
            number, ended = int(request.category), answer.finish_reason == "stop"
            ids = answer.token_ids[: len(answer.token_ids) - ended]
            found.append(Written(number=number, text=decode(ids), ended=ended))
            on_prompt()
            if len(found) == kept + part:
                file.add(found[kept:])
                kept = len(found)
    finally:
        file.add(found[kept:])
    return {one.number: one for one in found}


def prompts_of(
    written: Mapping[int, Written],
    numbers: Sequence[int],
    source: str,
    turn: UserTurn,
    special: Iterable[str],
    odd: OddRows,
) -> Iterator[Prompt]:
    """Yield what can be asked, in the order of the numbers.

    Args:
        written: By number.
        numbers: Of the run.
        source: Its name, for messages.
        turn: Of the target's chat template.
        special: The tokenizer's special tokens.
        odd: Counts what is left out. It is in the nature of sampling that something
            is, so this ends no run.
    """
    for number in numbers:
        where = f"{source}, prompt {number}"
        try:
            text = _usable(written[number], where, [*turn.markers, *special])
        except OddRowError as error:
            odd.note(error)
        else:
            yield Prompt(({"role": "user", "content": text},), CATEGORY, where=where)


def _usable(one: Written, where: str, markers: Sequence[str]) -> str:
    text = one.text.strip()
    told = f"got {text[:80]!r}"
    if not one.ended:
        raise OddRowError(
            "written, did not end", where, f"{told}, cut at --prompts-max-tokens"
        )
    if len(text) < MIN_CHARS:
        detail = f"{told}, expected {MIN_CHARS} characters or more"
        raise OddRowError("written, too short", where, detail)
    if len(text) > MAX_CHARS:
        detail = f"{len(text)} characters, expected at most {MAX_CHARS}"
        raise OddRowError("written, too many characters", where, detail)
    marker = next((marker for marker in markers if marker in text), None)
    if marker is not None:
        detail = f"has {marker!r}, which no user writes"
        raise OddRowError("written, a special token or a role", where, detail)
    if "\N{REPLACEMENT CHARACTER}" in text:
        raise OddRowError("half of a character", where, told)
    part = _different(text)
    if part < _LEAST_DIFFERENT:
        detail = f"{told}; {part:.0%} of its runs of {_RUN} characters are different"
        raise OddRowError("written, repeats itself", where, detail)
    return text


def _different(text: str) -> float:
    """Different runs of some characters, of all; in any language, and near 1 for what
    people write."""
    plain = " ".join(text.lower().split())
    runs = Counter(plain[at : at + _RUN] for at in range(len(plain) - _RUN + 1))
    return len(runs) / max(runs.total(), 1)
