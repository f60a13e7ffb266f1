# SPDX-License-Identifier: Apache-2.0
"""Later turns of ShareGPT's conversations, on the side of the first one."""

from typing import Any

import pytest

from tests.data.conftest import WriteShareGPT
from vllm_mtp.data import sharegpt
from vllm_mtp.data.demo_target import DemoPackageError
from vllm_mtp.data.prompts import Prompt, read_prompts
from vllm_mtp.data.settings import SourceSettings
from vllm_mtp.data.sharegpt import every_later_turn
from vllm_mtp.data.split import is_held_out


def read(prompts: str = "sharegpt:later", **fields: Any) -> list[Prompt]:
    return list(read_prompts(SourceSettings(prompts=prompts, **fields)))


def talk(name: str, turns: int, first: str | None = None) -> list[tuple[str, str]]:
    """A conversation whose every turn is long enough."""
    texts = [f"{name}, turn {number}, which is long." for number in range(turns)]
    texts[0] = first or texts[0]
    return [
        ("gpt" if number % 2 else "human", text) for number, text in enumerate(texts)
    ]


def test_each_conversation_up_to_each_later_human_turn(
    write_sharegpt: WriteShareGPT,
) -> None:
    write_sharegpt([talk("a", 6, first="  Hm?\n"), talk("b", 2), talk("c", 3)])
    found = read()
    assert [len(prompt.messages) for prompt in found] == [3, 5, 3]
    assert [turn["role"] for turn in found[1].messages] == [
        "user", "assistant", "user", "assistant", "user",
    ]  # fmt: skip
    # As they are in the file, but for the last one.
    assert found[0].messages[0]["content"] == "  Hm?\n"
    assert found[0].messages == found[1].messages[:3]
    assert {prompt.category for prompt in found} == {"later"}
    assert found[2].where == "sharegpt:later, prompt 2"
    assert read(skip=1, limit=1) == found[1:2]


A, B = ("human", "A question that is long."), ("gpt", "An answer.")
LAST = ("human", "  Another question, as long.\n")


@pytest.mark.parametrize(
    ("turns", "count"),
    [
        ([A, B, LAST], 1),
        ([("user", "A question."), B, LAST], 1),
        ([B, A, B, LAST], 0),
        ([("system", "Be good."), A, B, LAST], 0),
        ([A, A, LAST], 0),
        ([A, B, B, LAST], 0),
        ([A, B, LAST, LAST], 1),
        ([A, ("gpt", " \n"), LAST], 0),
        ([("human", ""), B, LAST], 0),
        ([("human", "ab\ud83d"), B, LAST], 0),
        ([A, ("gpt", "ab\ud83d"), LAST], 0),
        ([A, B, ("human", "ab\ud83d and many more letters")], 0),
        ([A, B, ("human", " Thank you very much ")], 0),
        ([A, B, ("human", "x" * 2001)], 0),
        # What is too short or too long is context all the same.
        ([A, B, ("human", "Go on"), B, LAST], 1),
        ([A, B, ("human", "x" * 2001), B, LAST], 1),
        ([A, B], 0),
        ([], 0),
    ],
)
def test_what_is_a_later_turn(
    turns: list[tuple[str, str]], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    # Not by a file: the fast reader of JSON hides halves of characters.
    monkeypatch.setattr(
        sharegpt, "iter_sharegpt_conversations", lambda: iter([whole, whole])
    )
    found = read()
    assert len(found) == count
    for prompt in found:
        assert prompt.messages[-1]["content"] == LAST[1].strip()
        assert len(prompt.messages) == turns.index(LAST) + 1


def test_a_conversation_is_on_one_side(write_sharegpt: WriteShareGPT) -> None:
    # The first turns are also too short and too long to be prompts themselves.
    firsts = [None, " Short?", "Long " * 500]
    write_sharegpt(
        [talk(str(n), 9, firsts[n % 3] and f"{firsts[n % 3]}{n}") for n in range(90)]
    )
    side_of_first = {prompt.identifier: prompt for prompt in read("sharegpt")}
    assert len(side_of_first) == 30
    sides: dict[str, set[bool]] = {}
    for prompt in read():
        first = str(prompt.messages[0]["content"]).strip()
        alone = Prompt(({"role": "user", "content": first},), "")
        assert prompt.split_id == alone.split_id == alone.identifier
        assert prompt.identifier != prompt.split_id
        sides.setdefault(first, set()).add(is_held_out(prompt.split_id, 0.3))
    assert len(sides) == 90
    assert all(len(found) == 1 for found in sides.values())
    assert 10 < sum(True in found for found in sides.values()) < 45


def test_with_the_answers_of_the_file(write_sharegpt: WriteShareGPT) -> None:
    write_sharegpt([talk("a", 4), talk("b", 6)])
    source = SourceSettings(prompts="sharegpt:later")
    found = list(read_prompts(source, answered=True))
    assert found == [
        Prompt(
            prompt.messages,
            "later",
            answer={"role": "assistant", "content": f"{name}, which is long."},
            split_on=prompt.split_on,
        )
        for prompt, name in zip(
            read(), ["a, turn 3", "b, turn 3", "b, turn 5"], strict=True
        )
    ]


def test_real_file() -> None:
    try:
        found = list(every_later_turn())
    except DemoPackageError as error:
        pytest.skip(str(error))
    assert len(found) > 20_000
    assert len({turn.turns for turn in found}) == len(found)
    assert all(len(turn.turns) % 2 == 1 for turn in found)
    assert all(20 <= len(turn.turns[-1]) <= 2000 for turn in found)
