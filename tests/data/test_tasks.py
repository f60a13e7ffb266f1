# SPDX-License-Identifier: Apache-2.0
"""Tasks made of ShareGPT's text: which kinds there are, and which there must not be."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.data.conftest import WriteShareGPT
from vllm_mtp.data import task_templates
from vllm_mtp.data.demo_target import DemoPackageError
from vllm_mtp.data.prompts import Prompt, read_prompts
from vllm_mtp.data.settings import SourceSettings
from vllm_mtp.data.split import id_of_text
from vllm_mtp.data.tasks import KINDS, Task, every_task

# What `examples/prompts/unseen.jsonl` asks for, by its kinds: nothing may come near.
UNSEEN = re.compile(
    r"\b(explain\w*|explanation\w*|differences?|how does|how do|why do|"
    r"what does (?:this|it)|what (?:is|are) an?|"
    r"extract\w*|list all|key points|alphabetical\w*|spelling|plain words|"
    r"two sentences|summar\w*|bullet\w*|simpl\w+ (?:words|language)|"
    r"fables?|stor(?:y|ies)|tales?|legends?|bedtime|"
    r"recipes?|cook\w*|bake\w*|dish(?:es)?|sql\w*|quer(?:y|ies)|tables?)\b",
    re.IGNORECASE,
)
# How a question may ask for one.
EXPLANATION = re.compile(
    r"\b(expla\w+|differences?|how do|how does|why|what (?:is|are|does|do))\b",
    re.IGNORECASE,
)
SQL = (
    "SELECT name FROM customers ORDER BY name LIMIT 10;\nSELECT 1 FROM orders WHERE a;",
    "insert into books (id, author, title) values (1, 'a', 'b'); -- and many more rows",
    "CREATE TABLE books (id INTEGER PRIMARY KEY, author TEXT, title TEXT, pages INT);",
    "import sqlite3\nconnection = sqlite3.connect('a.db')\nconnection.execute(text)\n",
    "UPDATE tickets SET status = 'open';\nDELETE FROM tickets WHERE status IS NULL; --",
)


def code(number: int) -> str:
    lines = [f"    total_{number} += item * {n}" for n in range(4)]
    return "\n".join(
        [f"def add_{number}(items):", *lines, f"    return total_{number}"]
    )


def prose(name: str) -> str:
    return (
        f"The town of {name} lies on a river, and the council of North {name} keeps "
        "its records there. Many people came for the market in the early days. They "
        "built houses of stone, and the oldest of them are still in use now."
    )


def name(number: int, letter: str) -> str:
    digits = "".join("abcdefghij"[int(digit)] for digit in str(number))
    return f"{letter}{digits}ton"


LETTERS = "ABC"  # one for each kind that is made of prose


def conversation(number: int, language: str = "python") -> list[tuple[str, str]]:
    """Has a text for every kind but maths."""
    paragraphs = [prose(name(number, letter)) for letter in LETTERS]
    return [
        ("human", f"Which towns lie at river number {number} in the north?"),
        ("gpt", f"Sure:\n\n```{language}\n{code(number)}\n```"),
        ("human", "Go on"),
        ("gpt", "\n\n".join(paragraphs)),
    ]


def cycles(tasks: Sequence[Task]) -> Iterator[Sequence[Task]]:
    for begin in range(0, len(tasks), len(KINDS)):
        yield tasks[begin : begin + len(KINDS)]


def test_kinds_come_by_turns_each_text_once(write_sharegpt: WriteShareGPT) -> None:
    write_sharegpt([conversation(number) for number in range(9)] * 2)
    found = list(every_task())
    assert len(found) == 9 * len(KINDS)
    for number, cycle in enumerate(cycles(found)):
        assert [task.kind for task in cycle] == list(KINDS)
        first = f"Which towns lie at river number {number} in the north?"
        by_kind = {task.kind: task for task in cycle}
        assert {task.first for task in cycle if task.kind != "maths"} == {first}
        assert code(number) in by_kind["code"].text
        assert first in by_kind["roleplay"].text
        assert any(who in by_kind["roleplay"].text for who in task_templates.PERSONAS)
        assert any(
            tongue in by_kind["translation"].text for tongue in task_templates.LANGUAGES
        )
        town = f"North {name(number, 'A')}"
        assert by_kind["passage"].text.count(town) == 2, "asked, and in the passage"
    # Of prose, no paragraph twice; and of code and questions neither.
    for number in range(9):
        for text in [
            code(number),
            *(prose(name(number, letter)) for letter in LETTERS),
        ]:
            assert sum(text in task.text for task in found) == 1
    assert list(every_task()) == found, "always the same"


def test_the_split_is_that_of_the_conversation(write_sharegpt: WriteShareGPT) -> None:
    write_sharegpt([conversation(number) for number in range(5)])
    source = SourceSettings(prompts="sharegpt:tasks")
    found = list(read_prompts(source))
    tasks = list(every_task())
    assert [prompt.category for prompt in found] == [task.kind for task in tasks]
    for prompt, task in zip(found, tasks, strict=True):
        own = id_of_text(task.text)
        assert prompt == Prompt(
            ({"role": "user", "content": task.text},),
            task.kind,
            split_on=task.first and id_of_text(task.first),
        )
        # Drawn numbers are nobody's.
        assert (prompt.split_id == own) == (task.kind == "maths")
    part = SourceSettings(prompts="sharegpt:tasks", skip=8, limit=3)
    assert list(read_prompts(part)) == found[8:11]


def test_a_turn_that_asks_for_maths_is_one(write_sharegpt: WriteShareGPT) -> None:
    asked = "A jar holds 30 beans and 12 fall out. How many beans are left?"
    odd = [
        "How many are left of it?",  # no number
        "Solve the equation above for x = 3.",  # stands elsewhere
        "Write SQL that tells how many of 30 rows there are.",  # stays unseen
    ]
    for number, text in enumerate([*odd, asked]):
        talk = [*conversation(number), ("human", text), ("gpt", "Well.")]
        write_sharegpt([talk])
        maths = [task for task in every_task() if task.kind == "maths"]
        assert len(maths) == 1
        assert (maths[0].text == text) == (text == asked)
        assert (maths[0].first is not None) == (text == asked)


def test_sql_and_other_kinds_that_stay_unseen_are_left_out(
    write_sharegpt: WriteShareGPT,
) -> None:
    for text in SQL:
        for language in ("python", "php", "sql"):
            talk = conversation(0)
            talk[1] = ("gpt", f"```{language}\n{text}\n{text}\n```")
            write_sharegpt([talk])
            assert list(every_task()) == []
    write_sharegpt([conversation(0, "sql")])
    assert list(every_task()) == []
    for word in (
        "recipe",
        "fable",
        "stories",
        "explains",
        "extract",
        "MySQL",
        "cooking",
    ):
        talk = conversation(0)
        talk[3] = ("gpt", talk[3][1].replace("market", f"{word} market"))
        write_sharegpt([talk])
        assert list(every_task()) == []
        talk = conversation(0)
        talk[0] = ("human", talk[0][1].replace("towns", f"{word} towns"))
        write_sharegpt([talk])
        assert list(every_task()) == []


def instructions() -> list[str]:
    """All that is asked, with nothing in the places of the text."""
    named = {
        kind: getattr(task_templates, kind)
        for kind in (
            "CODE",
            "REWRITING",
            "TRANSLATION",
            "ROLEPLAY",
            "PASSAGE",
        )
    }
    found = [text for texts in named.values() for text in texts]
    found += [text for text, _ in task_templates.MATHS]
    return [*found, *task_templates.PERSONAS, *task_templates.LANGUAGES]


def test_no_instruction_asks_for_what_stays_unseen() -> None:
    for text in instructions():
        assert not UNSEEN.search(text), text
    lines = Path("examples/prompts/unseen.jsonl").read_text("utf-8").splitlines()
    prompts = [json.loads(line) for line in lines]
    assert not {prompt["category"] for prompt in prompts} & set(KINDS)
    # The pattern means what it says: it finds most of what it stands for.
    kinds = {p["category"] for p in prompts if UNSEEN.search(p["prompt"])}
    assert kinds == {"explanation", "extraction", "fable", "recipe", "sql"}


def test_real_file() -> None:
    try:
        found = list(every_task())
    except DemoPackageError as error:
        pytest.skip(str(error))
    counts = Counter(task.kind for task in found)
    assert set(counts) == set(KINDS)
    assert len(set(counts.values())) == 1
    assert counts["code"] > 900
    assert len({task.text for task in found}) == len(found)
    assert all(20 <= len(task.text) <= 2000 for task in found if task.kind != "maths")
    assert sum(task.first is not None for task in found if task.kind == "maths") > 20
    for task in found:
        if task.kind == "code":
            assert not re.search(r"sql|\bselect\b.+\bfrom\b", task.text, re.IGNORECASE)
        if task.kind == "roleplay":
            assert not EXPLANATION.search(task.text), task.text
        if task.kind not in ("code", "maths"):
            assert not re.search(r"\b(recipe|fable|SQL)", task.text), task.text
