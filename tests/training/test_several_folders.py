# SPDX-License-Identifier: Apache-2.0
"""Training on the answers of several folders."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_answers import MakeArguments, keep_answers, training_log
from vllm_mtp.cli.main import _load
from vllm_mtp.data.settings import SourceSettings
from vllm_mtp.data.several import read_answers
from vllm_mtp.data.store import HELD_OUT, TRAIN, Row, read_split
from vllm_mtp.data.unseen import TrainingPrompts
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.errors import DataError
from vllm_mtp.sharing.provenance import read_provenance, training_prompts
from vllm_mtp.training.run import train

DESIGN = {"layers": "own:3", "max_steps": 2}


def row(number: int, length: int = 12) -> Row:
    """A text whose prompt has a hash of its own: a sixteenth of all, one by one."""
    identifier = f"{number:x}".ljust(32, "0")
    return {
        "prompt_id": identifier,
        "split_id": identifier,
        "category": "",
        "input_ids": [(37 * number + 11 * n) % 500 for n in range(length)],
        "loss_spans": [[4, length]],
        "finish_reason": "length",
    }


Make = Callable[..., Path]


@pytest.fixture
def make(tiny_llama: Path, tmp_path: Path) -> Make:
    def make(name: str, numbers: range, held_out: float = 0.25, **more: Any) -> Path:
        rows = [row(number) for number in numbers]
        return keep_answers(tmp_path / name, tiny_llama, rows, held_out, **more)

    return make


def names(rows: Any) -> list[str]:
    return [name[0] for name in rows["prompt_id"]]


def read(target: Path, *folders: Path) -> Any:
    return read_answers(folders, TargetFacts.from_folder(target), target)


def test_the_rows_of_all_folders_come_mixed(make: Make, tiny_llama: Path) -> None:
    a, b, c = make("a", range(0, 16, 2)), make("b", range(1, 16, 2)), None
    found = read(tiny_llama, b, a)
    assert names(found.held_out) == list("0123")
    assert names(found.train) == list("456789abcdef")
    assert found.dropped == 0
    assert found.train[0] == row(4)
    # One alone keeps the order that it has, and a shard may hold nothing out.
    alone = make("c", range(15, 7, -1), 0.9)
    assert names(read(tiny_llama, alone).train) == ["f"]
    c = make("d", range(12, 16))
    assert names(read(tiny_llama, a, c).train) == list("468accdeef")


def test_what_another_folder_holds_out_is_not_trained_on(
    make: Make, tiny_llama: Path
) -> None:
    whole, part = make("a", range(16), 0.25), make("b", range(4, 12), 0.5)
    found = read(tiny_llama, whole, part)
    # Of the second, 4 to 7 are held out, which the first trains on.
    assert names(found.held_out) == list("01234567")
    assert names(found.train) == list("8899aabbcdef")
    assert found.dropped == 4
    assert not set(found.train["prompt_id"]) & set(found.held_out["prompt_id"])
    only = make("c", range(8), 0.1), make("d", range(8), 0.6)
    with pytest.raises(DataError, match="every prompt to train on is held out"):
        read(tiny_llama, *only)


def test_prompts_of_one_conversation_are_not_on_two_sides(
    make: Make, tiny_llama: Path, tmp_path: Path
) -> None:
    """Later turns hang on the first one, whatever their own hashes are."""

    def later(number: int, first: int) -> Row:
        return row(number) | {"split_id": row(first)["prompt_id"], "category": "later"}

    whole = make("a", range(16), 0.5)
    rows = [later(9, 1), later(10, 6), later(0, 11)]
    other = keep_answers(tmp_path / "b", tiny_llama, rows, 0.25)
    assert names(read_split(other, HELD_OUT)) == ["9"]
    assert names(read_split(other, TRAIN)) == ["a", "0"]
    found = read(tiny_llama, whole, other)
    # The first folder holds out 6, and with it the second one's later turn; and its own
    # 9, whose text the second one holds out.
    assert names(found.held_out) == list("012345679")
    assert names(found.train) == list("8abcdef")
    assert found.dropped == 3
    assert sorted(set(found.held_out["category"])) == ["", "later"]


def test_folders_of_earlier_versions_go_along(
    make: Make, tiny_llama: Path, tmp_path: Path
) -> None:
    from datasets import DatasetDict, load_from_disk

    old, new = make("a", range(16), 0.5), make("b", range(4, 6))
    shutil.copytree(old, tmp_path / "copy")
    rows = load_from_disk(str(tmp_path / "copy"))
    assert isinstance(rows, DatasetDict)
    rows.remove_columns("split_id").save_to_disk(str(old))
    found = read(tiny_llama, old, new)
    assert names(found.held_out) == list("01234567")
    assert names(found.train) == list("89abcdef")
    assert found.dropped == 2


def test_folders_that_do_not_go_together(
    make: Make, tiny_llama: Path, tiny_qwen3: Path, tmp_path: Path
) -> None:
    a = make("a", range(16))
    (tmp_path / "link").symlink_to(a)
    with pytest.raises(DataError, match="link is named twice"):
        read(tiny_llama, a, tmp_path / "link")
    other = keep_answers(tmp_path / "other", tiny_qwen3, [row(1), row(9)], 0.25)
    with pytest.raises(DataError, match="other: the answers are those of the target"):
        read(tiny_llama, a, other)
    with pytest.raises(DataError, match=r"no generation\.json"):
        read(tiny_llama, a, tmp_path)
    few = [make("b", range(8, 9)), make("c", range(9, 12))]
    with pytest.raises(DataError, match="none of .* has rows in the split 'held_out'"):
        read(tiny_llama, *few)


def test_a_run_on_two_folders_says_so_everywhere(
    make: Make,
    arguments: MakeArguments,
    tiny_llama: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    a = make("a", range(16), prompts="sharegpt", skip=0, limit=20)
    b = make("b", range(16), 0.5, prompts="sharegpt", skip=50, limit=9, **kwargs)
    args = arguments(data=[str(a), str(b)], **DESIGN)
    with training_log(caplog):
        train(args, tiny_llama)
    said = caplog.text
    assert f"{b}: made with other settings than {a}: chat_template_kwargs" in said
    assert "data: 4 texts are not trained on: another folder holds" in said
    out = Path(str(args.output_dir))
    provenance = read_provenance(out)
    assert provenance is not None
    assert [data.name for data in provenance.every_data] == ["a", "b"]
    card = (out / "README.md").read_text()
    assert "`a`: the target's own answers to `sharegpt`" in card
    assert "`b`: the target's own answers to `sharegpt`" in card
    assert str(tmp_path) not in (out / "provenance.json").read_text() + card
    # For prompts that the drafter has not seen: what both held out, and left unread.
    assert training_prompts(out) == TrainingPrompts(
        "out",
        0.25,
        (
            SourceSettings(prompts="sharegpt", limit=20),
            SourceSettings(prompts="sharegpt", skip=50, limit=9),
        ),
    )


def test_names_on_the_command_line_and_in_yaml(tmp_path: Path) -> None:
    flags = ["--target", "t", "--output_dir", "o", "--report_to", "none"]
    settings = tmp_path / "a.yaml"
    for yaml, more, expected in (
        ("data: a", [], ["a"]),
        ("data: [a, b]", [], ["a", "b"]),
        ("data: [a, b]", ["--data", "c"], ["c"]),
        ("seed: 1", ["--data", "a", "b"], ["a", "b"]),
    ):
        settings.write_text(yaml)
        assert _load("train", [str(settings), *flags, *more]).data == expected


def test_one_name_is_taken_as_it_was(arguments: MakeArguments) -> None:
    assert arguments(data="folder").data == ["folder"]
