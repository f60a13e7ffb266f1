# SPDX-License-Identifier: Apache-2.0
"""Where prompts come from: a JSONL file, a Hugging Face dataset, or ShareGPT.

Those that the target writes itself are in `data.written`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_mtp.data.odd_rows import OddRowError, OddRows
from vllm_mtp.data.settings import SourceSettings
from vllm_mtp.data.sources import HF, LATER, SHAREGPT, TASKS, is_self, require_source
from vllm_mtp.data.split import Message, id_of_text, prompt_id
from vllm_mtp.errors import DataError, in_one_line

_READ = ("prompt", "messages", "category", "tools")  # of a row's fields
# Besides role and content, what vLLM's chat endpoint hands to a chat template.
_MORE_OF_A_TURN = (
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning",
    "reasoning_content",
)


@dataclass(frozen=True)
class Prompt:
    """A conversation that the target shall answer.

    Attributes:
        messages: Turns; the last one is the user's or a tool's.
        category: Kind of prompt.
        tools: What the target may call, as the chat endpoint takes them.
        where: The row that it was read from, for messages.
        answer: The assistant's turn that the source has behind it, where it was read.
        split_on: Identifier of the prompt whose side of the split is this one's too,
            because this one has text of it or of an answer to it; None: its own.
    """

    messages: tuple[Message, ...]
    category: str
    tools: tuple[Any, ...] = ()
    where: str = field(default="", compare=False)
    answer: Message | None = None
    split_on: str | None = None

    @cached_property
    def identifier(self) -> str:
        """See `prompt_id`."""
        return prompt_id(self.messages, self.tools)

    @property
    def split_id(self) -> str:
        """What `is_held_out` decides by."""
        return self.split_on or self.identifier


def read_prompts(
    source: SourceSettings, odd: OddRows | None = None, *, answered: bool = False
) -> Iterator[Prompt]:
    """Yield a source's prompts in its order, from row ``skip`` on, of ``limit`` rows.

    Args:
        source: Where they come from.
        odd: Counts the rows that cannot be used; None: the first one raises.
        answered: Every conversation ends with its answer.

    Raises:
        DataError: The source cannot be read; the message names the file and line,
            or the dataset and column. Or it is one that the target has yet to write.
        OddRowError: A row cannot be used, and rows are not skipped.
        DemoPackageError: ShareGPT's package is missing.
    """
    require_source(source.prompts)
    if is_self(source.prompts):
        raise DataError(
            f"--prompts {source.prompts}: only `vllm-mtp generate` has the target "
            "write prompts; name a source that has some"
        )
    if source.prompts in _SHAREGPT_ROWS:
        numbered = enumerate(_SHAREGPT_ROWS[source.prompts](answered))
        rows: Iterator[_Row] = (
            replace(row, where=f"{source.prompts}, prompt {number}")
            for number, row in islice(numbered, source.skip, _stop(source))
        )
    elif source.prompts.startswith(HF):
        rows = _hf_rows(source)
    else:
        rows = _jsonl_rows(source)
    odd = odd or OddRows(strict=True)
    for row in rows:
        try:
            prompt = row.prompt(answered)
        except OddRowError as error:
            odd.skip(error)
        else:
            yield prompt


@dataclass(frozen=True)
class _Row:
    """One row as it was read, not looked at yet."""

    where: str
    category: str  # unless the row has one
    line: bytes | None = None  # of a JSONL file
    fields: Any = None
    split_on: str | None = None  # see `Prompt`

    def prompt(self, answered: bool) -> Prompt:
        """Raises OddRowError where it is none."""
        fields = self.fields if self.line is None else _parsed(self.line, self.where)
        if not isinstance(fields, Mapping):
            raise OddRowError(
                "not an object", self.where, f"got {_short(fields)}, expected one"
            )
        # First: all else quotes them, looks into them or writes them.
        read = [fields.get(key) for key in _READ]
        _require_text(read, self.where)
        _require_json(read, self.where)
        given = [key for key in ("prompt", "messages") if key in fields]
        if len(given) != 1:
            raise OddRowError(
                "no prompt",
                self.where,
                'expected an object with either "prompt" (a text) or "messages" (a '
                f"list of turns), got {_short(fields)}",
            )
        turns, answer = fields[given[0]], None
        if answered:
            turns, answer = _without_answer(turns, self.where)
        return Prompt(
            messages_of(turns, self.where),
            _category_of(fields.get("category"), self.category, self.where),
            _tools_of(fields.get("tools"), self.where),
            self.where,
            answer,
            self.split_on,
        )


def _stop(source: SourceSettings) -> int | None:
    return None if source.limit is None else source.skip + source.limit


def _first_turns(_: bool) -> Iterator[_Row]:
    from vllm_mtp.data.sharegpt import every_sharegpt_prompt

    for text in every_sharegpt_prompt():
        yield _Row("", "sharegpt", fields={"prompt": text})


def _later_turns(answered: bool) -> Iterator[_Row]:
    from vllm_mtp.data.sharegpt import every_later_turn

    for turn in every_later_turn():
        texts = list(turn.turns)
        if answered and turn.answer is not None:
            texts.append(turn.answer)
        turns = [
            {"role": "assistant" if number % 2 else "user", "content": text}
            for number, text in enumerate(texts)
        ]
        split_on = id_of_text(turn.first)
        yield _Row("", "later", fields={"messages": turns}, split_on=split_on)


def _tasks(_: bool) -> Iterator[_Row]:
    from vllm_mtp.data.tasks import every_task

    for task in every_task():
        split_on = None if task.first is None else id_of_text(task.first)
        fields = {"prompt": task.text}
        yield _Row("", task.kind, fields=fields, split_on=split_on)


# Each takes whether the answers are wanted, and numbers the same rows with and without.
_SHAREGPT_ROWS: dict[str, Callable[[bool], Iterator[_Row]]] = {
    SHAREGPT: _first_turns,
    LATER: _later_turns,
    TASKS: _tasks,
}


def _jsonl_rows(source: SourceSettings) -> Iterator[_Row]:
    path = Path(source.prompts).expanduser()
    try:
        with path.open("rb") as file:
            lines = ((n, line) for n, line in enumerate(file, 1) if line.strip())
            for number, line in islice(lines, source.skip, _stop(source)):
                yield _Row(f"{path}, line {number}", path.stem, line=line)
    except OSError as error:
        raise DataError(
            f"--prompts {source.prompts}: cannot be read ({error})"
        ) from None


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OddRowError(
            "not JSON", where, f"{error}; expected one object per line"
        ) from None


def _hf_rows(source: SourceSettings) -> Iterator[_Row]:
    rows = _hf_dataset(source)
    name = source.prompts.removeprefix(HF).rstrip("/").rsplit("/", 1)[-1]
    wanted = [key for key in (source.column, source.category_column) if key is not None]
    for key in wanted:
        if key not in rows.column_names:
            raise DataError(
                f"{source.prompts}: no column {key!r}; it has {rows.column_names}. "
                "Choose with --prompts-column and --prompts-category-column"
            )
    # Others may hold images, which would be decoded.
    columns = rows.select_columns(list(dict.fromkeys(wanted)))
    end = min(len(rows), len(rows) if (stop := _stop(source)) is None else stop)
    start = min(source.skip, end)
    for number, row in enumerate(columns.select(range(start, end)), start):
        fields = {"prompt": row[source.column]}
        if source.category_column is not None:
            fields["category"] = row[source.category_column]
        where = f"{source.prompts}, row {number}, column {source.column!r}"
        yield _Row(where, name, fields=fields)


def _hf_dataset(source: SourceSettings) -> Any:
    """Load one split, from a folder of ``save_to_disk`` or from the hub."""
    import datasets

    name = source.prompts.removeprefix(HF)
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
            f"({in_one_line(error)}); check the name and --prompts-split"
        ) from None


def messages_of(value: Any, where: str) -> tuple[Message, ...]:
    """Check a prompt: a text, or turns of which the last one can be answered.

    Args:
        value: What the source holds.
        where: Its place, for messages.

    Raises:
        OddRowError: It is none.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise OddRowError(
            "no conversation",
            where,
            'expected a text or a list of {"role": text, "content": text}, got '
            f"{_short(value)}",
        )
    turns = tuple(_turn_of(turn, where) for turn in value)
    last = turns[-1]
    if last["role"] not in ("user", "tool"):
        raise OddRowError(
            "the last turn is not the user's or a tool's",
            where,
            f"got the role {ascii(last['role'])[:40]}; leave the answer out",
        )
    if not text_of(last["content"]).strip():
        raise OddRowError("the last turn is empty", where, "expected some text")
    return turns


def _without_answer(value: Any, where: str) -> tuple[Any, Message]:
    """Take the last turn, the assistant's, from a conversation."""
    last = value[-1] if isinstance(value, list) and value else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        raise OddRowError(
            "the last turn is not the assistant's",
            where,
            f"got {_short(value if last is None else last)}; with --answers given a "
            "row is a list of turns and ends with the answer",
        )
    if len(value) == 1:
        raise OddRowError("no turn before the answer", where, "expected one to answer")
    answer = _turn_of(last, where)
    says = text_of(answer["content"]).strip() or set(answer) - {"role", "content"}
    if not says:
        raise OddRowError("the answer is empty", where, "expected some text")
    return value[:-1], answer


def text_of(content: Any) -> str:
    """A turn's content as one text; parts are joined as vLLM joins them."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content or ())


def _turn_of(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise OddRowError(
            "a turn without a role",
            where,
            f'expected {{"role": text, "content": text}}, got {_short(turn)}',
        )
    # Datasets with columns write what a turn does not have as null.
    more = {
        key: turn[key] for key in _MORE_OF_A_TURN if turn.get(key) not in (None, [])
    }
    content = turn.get("content")
    if content is None and "tool_calls" not in more:
        raise OddRowError(
            "content is null or missing", where, f"in the turn {_short(turn)}"
        )
    checked: Any = None if content is None else _content_of(content, where)
    return {"role": turn["role"], "content": checked, **more}  # type: ignore[typeddict-item]


def _content_of(content: Any, where: str) -> Any:
    """A text, or several parts of text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise OddRowError(
            "content is no text", where, f"got {_short(content)}, expected a text"
        )
    parts = [_part_of(part, where) for part in content]
    # vLLM makes the same of a text and of a list with one.
    return parts[0]["text"] if len(parts) == 1 else parts


def _part_of(part: Any, where: str) -> dict[str, str]:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    # A name such as image_url, and no long text: it tells rows apart in the counts.
    named = isinstance(kind, str) and kind.isidentifier() and len(kind) < 40
    what = kind if named and kind != "text" else "unknown"
    raise OddRowError(
        f"content has a part that is no text ({what!r})",
        where,
        f"got {_short(part)}; a drafter is trained on text alone",
    )


def _category_of(value: Any, default: str, where: str) -> str:
    if value is None:
        return default
    if isinstance(value, (str, int, float)):
        return str(value)
    raise OddRowError("category is no text", where, f"got {_short(value)}")


def _tools_of(value: Any, where: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(tool, Mapping) for tool in value):
        return tuple(value)
    raise OddRowError(
        "tools is no list of objects", where, f"got {_short(value)}, expected a list"
    )


def _require_text(value: Any, where: str) -> None:
    """JSON can spell halves of characters, which nothing can write or tokenize."""
    for text in _texts_in(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise OddRowError(
                "half of a character",
                where,
                f"{text[error.start : error.end]!r} at position {error.start} of a "
                "text (an emoji cut in two?)",
            ) from None


def _require_json(value: Any, where: str) -> None:
    """Datasets hold dates, bytes and arrays too, which no request can."""
    try:
        json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise OddRowError(
            "a value that JSON cannot write",
            where,
            f"{error}; expected texts, numbers, lists and objects",
        ) from None


def _texts_in(value: Any) -> Iterator[str]:
    """Every text inside, keys included, however deep."""
    left = [value]
    while left:
        found = left.pop()
        if isinstance(found, str):
            yield found
        elif isinstance(found, Mapping):
            left += [*found.keys(), *found.values()]
        elif isinstance(found, (list, tuple)):
            left += found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
