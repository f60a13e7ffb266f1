# SPDX-License-Identifier: Apache-2.0
"""Prompts from files and datasets, and what is said of broken ones."""

import json
import shutil
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import WriteJsonl
from vllm_mtp.data.odd_rows import OddRowError, OddRows
from vllm_mtp.data.prompts import Prompt, read_prompts
from vllm_mtp.data.settings import SourceSettings
from vllm_mtp.errors import DataError

datasets = pytest.importorskip("datasets")

TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and now?"},
]


def read(prompts: str | Path, **fields: Any) -> list[Prompt]:
    return list(read_prompts(SourceSettings(prompts=str(prompts), **fields)))


def texts(found: list[Prompt]) -> list[str]:
    return [prompt.messages[-1]["content"] for prompt in found]


def test_jsonl_with_texts_and_turns(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(
        [
            {"prompt": "one", "category": "code"},
            {"messages": TURNS},
            {"prompt": "three", "category": None, "more": 1},
            {"prompt": "four", "category": 7},
        ]
    )
    assert read(path) == [
        Prompt(({"role": "user", "content": "one"},), "code"),
        Prompt(tuple(TURNS), "prompts"),  # type: ignore[arg-type]
        Prompt(({"role": "user", "content": "three"},), "prompts"),
        Prompt(({"role": "user", "content": "four"},), "7"),
    ]


def test_jsonl_with_empty_lines_a_byte_order_mark_and_no_last_newline(
    tmp_path: Path,
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "\xc3\xa9"}')
    assert texts(read(path)) == ["a", "é"]


@pytest.mark.parametrize(
    ("skip", "limit", "expected"),
    [(0, None, "abcde"), (1, 2, "bc"), (3, 9, "de"), (9, 1, ""), (0, 0, "")],
)
def test_skip_and_limit(
    write_jsonl: WriteJsonl, skip: int, limit: int | None, expected: str
) -> None:
    path = write_jsonl([{"prompt": letter} for letter in "abcde"])
    assert "".join(texts(read(path, skip=skip, limit=limit))) == expected


SURROGATE = "\\ud83d"
# A line, the reason that is counted, and words of the message.
ODD = [
    ("{'prompt': 'a'}", "not JSON", ["one object per line"]),
    ('{"prompt": "a"', "not JSON", []),
    ('{"prompt": "\xff"}', "not JSON", ["utf-8"]),
    ("[" * 50_000, "not JSON", ["recursion"]),
    ("[1]", "not an object", ["got [1]"]),
    ('{"text": "a"}', "no prompt", ['"messages"', "got {'text': 'a'}"]),
    ('{"prompt": "a", "messages": []}', "no prompt", ["either"]),
    ('{"prompt": null}', "no conversation", ["got None"]),
    ('{"prompt": 7}', "no conversation", ["got 7"]),
    ('{"messages": []}', "no conversation", ["got []"]),
    ('{"messages": {"role": "user"}}', "no conversation", []),
    ('{"messages": ["hi"]}', "a turn without a role", ["got 'hi'"]),
    ('{"messages": [{"content": "a"}]}', "a turn without a role", []),
    ('{"messages": [{"role": 1, "content": "a"}]}', "a turn without a role", []),
    ('{"messages": [{"role": "user"}]}', "content is null or missing", []),
    (
        '{"messages": [{"role": "user", "content": null}]}',
        "content is null or missing",
        [],
    ),
    ('{"messages": [{"role": "user", "content": 1.5}]}', "content is no text", []),
    (
        '{"messages": [{"role": "user", "content": [1]}]}',
        "content has a part that is no text ('unknown')",
        ["got 1"],
    ),
    (
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url", '
            '"image_url": {"url": "x"}}, {"type": "text", "text": "what is it?"}]}]}'
        ),
        "content has a part that is no text ('image_url')",
        ["text alone"],
    ),
    (
        '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
        "content has a part that is no text ('unknown')",
        [],
    ),
    (
        (
            '{"messages": [{"role": "user", "content": "a"}, '
            '{"role": "assistant", "content": "b"}]}'
        ),
        "the last turn is not the user's or a tool's",
        ["got the role 'assistant'", "leave the answer out"],
    ),
    (
        json.dumps({"messages": [{"role": "x\n" * 999, "content": "a"}]}),
        "the last turn is not the user's or a tool's",
        [],
    ),
    (
        json.dumps({"messages": [{"role": "user", "content": [{"type": "x\n" * 99}]}]}),
        "content has a part that is no text ('unknown')",
        [],
    ),
    ('{"prompt": ""}', "the last turn is empty", []),
    ('{"prompt": " \\n"}', "the last turn is empty", []),
    ('{"messages": [{"role": "user", "content": []}]}', "the last turn is empty", []),
    ('{"prompt": "a", "category": ["b"]}', "category is no text", ["got ['b']"]),
    ('{"prompt": "a", "tools": "b"}', "tools is no list of objects", []),
    ('{"prompt": "a", "tools": [1]}', "tools is no list of objects", []),
    *(
        (line, "half of a character", ["'\\ud83d'", "position 2"])
        for line in (
            f'{{"prompt": "ab{SURROGATE}"}}',
            f'{{"prompt": "a", "category": "ab{SURROGATE}"}}',
            f'{{"prompt": "a", "tools": [{{"ab{SURROGATE}": 1}}]}}',
            (
                f'{{"messages": [{{"role": "ab{SURROGATE}", "content": "x"}}, '
                '{"role": "user", "content": "x"}]}'
            ),
            f'{{"messages": [{{"role": "ab{SURROGATE}", "content": "x"}}]}}',
            f'{{"messages": ["ab{SURROGATE}"]}}',
            f'{{"messages": [{{"role": "user", "content": ["x", "ab{SURROGATE}"]}}]}}',
            (
                '{"messages": [{"role": "assistant", "content": null, "tool_calls": '
                f'[{{"function": {{"name": "ab{SURROGATE}"}}}}]}}, '
                '{"role": "user", "content": "x"}]}'
            ),
        )
    ),
]


@pytest.mark.parametrize(
    ("line", "reason", "words"), ODD, ids=[line[:60] for line, *_ in ODD]
)
def test_odd_lines_are_named(
    tmp_path: Path, line: str, reason: str, words: list[str]
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(OddRowError) as error:
        read(path)
    said = str(error.value)
    assert said.startswith(f"{path}, line 3: {reason}: ")
    assert len(said) < 400
    assert "\n" not in said
    for word in words:
        assert word in said
    # It is behind what was asked for, or passed over.
    assert texts(read(path, limit=1)) == ["fine"]
    assert read(path, skip=2) == []


def test_odd_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [line for line, *_ in ODD for _ in range(2)]
    whole = ['{"prompt": "fine"}', *lines, '{"prompt": "too"}']
    path.write_bytes("\n".join(whole).encode("latin-1"))
    odd = OddRows()
    found = list(read_prompts(SourceSettings(prompts=str(path)), odd))
    assert texts(found) == ["fine", "too"]
    assert [prompt.where for prompt in found] == [
        f"{path}, line 1",
        f"{path}, line {len(lines) + 2}",
    ]
    assert sum(odd.counts.values()) == len(lines)
    assert len(odd.counts) == len({reason for _, reason, _ in ODD})
    for text in (*odd.counts, *odd.explained()):
        assert text.encode()
        assert "\n" not in text
        assert len(text) < 700
    assert any(
        line.startswith(f"8 x not JSON (first: {path}, line 2: ")
        for line in odd.explained()
    )


@pytest.mark.parametrize("value", [b"x", date(2026, 1, 1), {"a": b"x"}])
def test_values_of_datasets_that_no_request_can_have(
    tmp_path: Path, value: Any
) -> None:
    call = {"function": {"name": "f", "arguments": value}}
    more: list[dict[str, Any]] = [
        {"role": "user", "content": "a", "name": value},
        {"role": "user", "content": "a", "tool_calls": [call]},
        {"role": "user", "content": "a", "tool_call_id": value},
    ]
    for turn in more:
        datasets.Dataset.from_dict({"prompt": [[turn], [TURNS[0]]]}).save_to_disk(
            str(tmp_path / "saved")
        )
        odd = OddRows()
        source = SourceSettings(prompts=f"hf:{tmp_path / 'saved'}")
        assert texts(list(read_prompts(source, odd))) == ["hi"]
        assert odd.counts == {"a value that JSON cannot write": 1}
        assert "is not JSON serializable" in odd.explained()[0]
        shutil.rmtree(tmp_path / "saved")


def test_parts_of_text_and_calls_of_tools_are_kept(write_jsonl: WriteJsonl) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    two = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    path = write_jsonl(
        [
            {"messages": [{"role": "user", "content": two[:1], "weight": 1}]},
            {"messages": [{"role": "user", "content": ["a", two[1]]}]},
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "content": "y", "tool_call_id": "1", "name": None},
                ],
                "tools": [{"type": "function"}],
            },
        ]
    )
    one, several, called = read(path)
    # As the chat endpoint, which knows no weight.
    assert one.messages == ({"role": "user", "content": "a"},)
    assert several.messages == ({"role": "user", "content": two},)
    assert called.messages[1:] == (
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "y", "tool_call_id": "1"},
    )
    assert called.tools == ({"type": "function"},)


def test_a_long_broken_line_is_not_printed_in_full(write_jsonl: WriteJsonl) -> None:
    with pytest.raises(DataError) as error:
        read(write_jsonl([{"text": "x" * 10_000}]))
    assert len(str(error.value)) < 400


def test_a_missing_file_is_named_with_the_other_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file.*hf:.*sharegpt"):
        read(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("name", ["sharegpt:latter", "sharegpt:", "ShareGPT", "self"])
def test_a_misspelt_source_is_named_with_those_that_there_are(name: str) -> None:
    with pytest.raises(DataError) as error:
        read(name)
    said = str(error.value)
    assert said.startswith(f"--prompts {name}: ")
    assert "\n" not in said
    for source in ("sharegpt,", "sharegpt:later", "sharegpt:tasks", "self:N", "hf:"):
        assert source in said


@pytest.mark.parametrize("count", ["", "0", "-3", "1.5", "1e3", "10000001", "²"])
def test_how_many_prompts_the_target_shall_write(count: str) -> None:
    with pytest.raises(DataError, match=r"expected self:N .* 1 to 10,000,000"):
        read(f"self:{count}")


def test_only_generate_has_prompts_written() -> None:
    with pytest.raises(DataError, match="self:3: only `vllm-mtp generate`"):
        read("self:3")


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A dataset with two splits, as ``save_to_disk`` writes it."""
    columns = {
        "prompt": ["a", "b", "c"],
        "turns": [TURNS, TURNS[:1], TURNS],
        "kind": ["x", None, "y"],
        "number": [1, 2, 3],
    }
    train = datasets.Dataset.from_dict(columns)
    both = datasets.DatasetDict(train=train, test=train.select([2]))
    both.save_to_disk(str(tmp_path / "mine"))
    return f"hf:{tmp_path / 'mine'}"


def test_a_saved_dataset(saved: str) -> None:
    found = read(saved)
    assert texts(found) == ["a", "b", "c"]
    assert {prompt.category for prompt in found} == {"mine"}
    assert texts(read(saved, split="test")) == ["c"]
    assert texts(read(saved, skip=1, limit=1)) == ["b"]


def test_columns_of_a_saved_dataset(saved: str) -> None:
    found = read(saved, column="turns", category_column="kind")
    assert [len(prompt.messages) for prompt in found] == [3, 1, 3]
    assert found[0].messages == tuple(TURNS)
    assert [prompt.category for prompt in found] == ["x", "mine", "y"]


def test_a_dataset_without_splits(tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(str(folder))
    assert texts(read(f"hf:{folder}/")) == ["a"]


def test_a_folder_of_files_goes_through_the_library(
    write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_jsonl([{"prompt": "a"}, {"prompt": "b"}])
    (tmp_path / "files").mkdir()
    path.rename(tmp_path / "files" / "train.jsonl")
    assert texts(read(f"hf:{tmp_path / 'files'}")) == ["a", "b"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"column": "text"}, ["'text'", "'turns'", "--prompts-column"]),
        ({"category_column": "sort"}, ["'sort'", "--prompts-category-column"]),
        ({"split": "dev"}, ["'dev'", "--prompts-split"]),
        ({"column": "number"}, ["row 0", "'number'", "got 1"]),
    ],
)
def test_what_is_wrong_with_a_dataset(
    saved: str, fields: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(DataError) as error:
        read(saved, **fields)
    for word in [saved, *words]:
        assert word in str(error.value)


def test_a_missing_dataset_is_named() -> None:
    with pytest.raises(DataError, match=r"hf:/nonexistent/data.*check the name"):
        read("hf:/nonexistent/data")


def test_sharegpt(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake() -> Iterator[str]:
        return (f"text {number}" for number in range(5))

    monkeypatch.setattr("vllm_mtp.data.sharegpt.every_sharegpt_prompt", fake)
    assert texts(read("sharegpt", skip=3)) == ["text 3", "text 4"]
    (found,) = read("sharegpt", skip=1, limit=1)
    assert found == Prompt(({"role": "user", "content": "text 1"},), "sharegpt")
