# SPDX-License-Identifier: Apache-2.0
"""Prompts from files and datasets, and what is said of broken ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import WriteJsonl
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


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'prompt': 'a'}", ["not JSON", "one object per line"]),
        ('{"prompt": "a"', ["not JSON"]),
        ('{"prompt": "\xff"}', ["not JSON", "utf-8"]),
        ("[1]", ['"prompt"', '"messages"', "got [1]"]),
        ('{"text": "a"}', ['"prompt"', "got {'text': 'a'}"]),
        ('{"prompt": "a", "messages": []}', ["either"]),
        ('{"prompt": null}', ['"prompt"', "got None"]),
        ('{"messages": []}', ['"messages"', "got []"]),
        ('{"messages": [{"role": "user"}]}', ['"role": text']),
        ('{"messages": [{"role": "user", "content": [1]}]}', ['"content": text']),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            ["the last turn must be the user's", "'assistant'", "leave the answer out"],
        ),
        ('{"prompt": "ab\\ud83d"}', ["half of a character", "'\\ud83d'", "position 2"]),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: str, words: list[str]) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(DataError) as error:
        read(path)
    for word in [f"{path}, line 3", *words]:
        assert word in str(error.value)
    # It is behind what was asked for.
    assert texts(read(path, limit=1)) == ["fine"]


def test_a_long_broken_line_is_not_printed_in_full(write_jsonl: WriteJsonl) -> None:
    with pytest.raises(DataError) as error:
        read(write_jsonl([{"text": "x" * 10_000}]))
    assert len(str(error.value)) < 400


def test_a_missing_file_is_named_with_the_other_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file.*hf:.*sharegpt"):
        read(tmp_path / "nothing.jsonl")


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
