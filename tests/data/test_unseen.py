# SPDX-License-Identifier: Apache-2.0
"""Prompts that nobody was trained on, by hash and by what was read."""

import json
from pathlib import Path

import pytest

from tests.data.conftest import WriteShareGPT
from tests.data.test_tasks import conversation
from vllm_mtp.data import sharegpt
from vllm_mtp.data.demo_target import DemoPackageError
from vllm_mtp.data.prompts import read_prompts
from vllm_mtp.data.settings import SourceSettings
from vllm_mtp.data.split import id_of_text, is_held_out, prompt_id
from vllm_mtp.data.tasks import KINDS
from vllm_mtp.data.unseen import TrainingPrompts, choice_in_words, unseen_prompts
from vllm_mtp.installed import installed_folder
from vllm_mtp.sharing.provenance import read_provenance

PROMPTS = [f"Question number {number}, {'so ' * (number % 7)}?" for number in range(60)]
# Too short for `generate`, and too long for the shortest loads: both shift no number.
FILE = [PROMPTS[0], "Hm?", *PROMPTS[1:30], PROMPTS[3], "long " * 300, *PROMPTS[30:]]


@pytest.fixture(autouse=True)
def sharegpt_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sharegpt.json"
    turns = [[{"from": "human", "value": text}] for text in FILE]
    file.write_text(json.dumps([{"conversations": turn} for turn in turns]))
    monkeypatch.setattr(sharegpt, "demo_package_file", lambda *_: ("0", file))


def held_out(text: str, fraction: float = 0.3) -> bool:
    return is_held_out(prompt_id([{"role": "user", "content": text}]), fraction)


def part(skip: int, limit: int | None = None) -> tuple[SourceSettings, ...]:
    return (SourceSettings(prompts="sharegpt", skip=skip, limit=limit),)


def numbered() -> list[str]:
    """As `generate` numbers them."""
    found = read_prompts(SourceSettings(prompts="sharegpt"))
    return [prompt.messages[0]["content"] for prompt in found]


def test_by_hash_alone_where_other_runs_came_before() -> None:
    known = TrainingPrompts("d", 0.3, read=None, assumed=True)
    found = unseen_prompts(99, [known])
    assert found == [text for text in numbered() if held_out(text)]
    assert 5 < len(found) < 35
    assert unseen_prompts(3, [known]) == found[:3]
    assert "runs before its last one" in choice_in_words([known])


def test_also_what_a_single_run_never_read() -> None:
    known = TrainingPrompts("d", 0.3, read=part(10, 30))
    texts = numbered()
    assert unseen_prompts(99, [known]) == [
        text
        for number, text in enumerate(texts)
        if held_out(text) or not 10 <= number < 40
    ]


def test_the_length_of_a_load_shifts_no_number() -> None:
    """What was read is numbered by the length filter of `generate`, not the load's."""
    known = TrainingPrompts("d", 0.0, read=part(31))
    texts = numbered()
    assert texts[30].startswith("long ")
    assert unseen_prompts(99, [known]) == texts[:31]
    assert unseen_prompts(99, [known], max_chars=100) == texts[:30]


def test_by_none_of_several() -> None:
    one = TrainingPrompts("one", 0.3, read=part(0, 30))
    other = TrainingPrompts("other", 0.3, read=part(30))
    assert unseen_prompts(99, [one, other]) == [t for t in numbered() if held_out(t)]
    assert unseen_prompts(99, [one, TrainingPrompts("u", 1.0)]) == unseen_prompts(
        99, [one]
    )


def conversations(count: int) -> list[list[tuple[str, str]]]:
    """With a first question that is a prompt, a later one, and text for tasks."""
    return [conversation(number) + [("human", "And then, what came of the town?")]
            for number in range(count)]  # fmt: skip


@pytest.mark.parametrize(
    ("prompts", "rows"), [("sharegpt:later", 1), ("sharegpt:tasks", len(KINDS))]
)
def test_a_conversation_is_seen_by_any_of_its_rows(
    prompts: str, rows: int, write_sharegpt: WriteShareGPT
) -> None:
    write_sharegpt(conversations(20))
    texts = numbered()
    assert len(texts) == 20
    # All rows of the conversations 5 to 9.
    read = SourceSettings(prompts=prompts, skip=5 * rows, limit=5 * rows)
    known = TrainingPrompts("d", 0.2, (read,))
    expected = [
        text
        for number, text in enumerate(texts)
        if held_out(text, 0.2) or not 5 <= number < 10
    ]
    assert unseen_prompts(99, [known]) == expected
    # The other way round, for prompts that are tasks; drawn numbers are nobody's text.
    tasks = list(read_prompts(SourceSettings(prompts="sharegpt:tasks")))
    unseen = {id_of_text(text) for text in expected}
    found = unseen_prompts(999, [known], source="sharegpt:tasks")
    real = [task for task in tasks if task.split_on is not None]
    assert len(real) == 20 * (len(KINDS) - 1)
    for task in real:
        text = task.messages[-1]["content"]
        assert (text in found) == (task.split_id in unseen)
    assert choice_in_words([known], "sharegpt:tasks").startswith("of `sharegpt:tasks`")


def test_what_a_target_wrote_is_nobody_s_prompt() -> None:
    known = TrainingPrompts("d", 0.0, ())
    assert unseen_prompts(99, [known]) == numbered()


def test_nothing_is_certain_without_a_split() -> None:
    assert unseen_prompts(99, [TrainingPrompts("d", 0.0, assumed=True)]) == []


def test_what_is_not_known_is_said() -> None:
    unknown = TrainingPrompts("mine", None)
    assert unseen_prompts(99, [unknown]) == numbered()
    assert "`mine`: not known (no provenance.json)" in choice_in_words([unknown])


@pytest.fixture
def real_file(monkeypatch: pytest.MonkeyPatch, sharegpt_file: None) -> list[str]:
    """All real prompts, as `generate` numbers them."""
    monkeypatch.undo()
    try:
        return numbered()
    except DemoPackageError as error:
        pytest.skip(str(error))


def test_the_prompts_of_the_published_benchmark_were_unseen(
    real_file: list[str],
) -> None:
    """docs/benchmark.md says so: they were chosen otherwise then."""
    first, *_ = sharegpt.sharegpt_prompts(1, skip=12_000, max_chars=1000)
    last_run = read_provenance(installed_folder("cheap"))
    assert last_run is not None
    assert last_run.data is not None
    source = last_run.data.generation.settings.source
    assert source.limit is not None
    assert source.skip + source.limit == 12_684
    assert real_file.index(first) == 12_840


def test_the_prompts_of_other_kinds_are_not_in_sharegpt(real_file: list[str]) -> None:
    lines = Path("examples/prompts/unseen.jsonl").read_text("utf-8").splitlines()
    unseen = {json.loads(line)["prompt"].strip() for line in lines}
    assert len(real_file) > 10_000
    assert len(unseen) == 40
    assert not unseen & set(real_file)
