# SPDX-License-Identifier: Apache-2.0
"""The folder: refused, killed at any moment, finished, read."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.full_disk import no_file_above
from tests.tiny_targets import make_tiny_llama
from vllm_mtp.data.settings import (
    EngineSettings,
    PromptCounts,
    Provenance,
    RunFile,
    RunSettings,
    SamplingSettings,
    SourceSettings,
)
from vllm_mtp.data.split import digest_of, prompt_id
from vllm_mtp.data.store import (
    HELD_OUT,
    SPLITS,
    TRAIN,
    Row,
    Store,
    read_provenance,
    read_split,
    require_made_by,
)
from vllm_mtp.drafter.target_facts import TargetFacts, weights_sample_sha256
from vllm_mtp.errors import DataError, OutputError, UnsupportedTargetError

pytest.importorskip("datasets")

FACTS = TargetFacts(
    name="tiny",
    model_type="llama",
    num_hidden_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=512,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    weights_fingerprint="00ff",
)
SETTINGS = RunSettings(
    target=FACTS,
    source=SourceSettings(prompts="p.jsonl"),
    sampling=SamplingSettings(max_tokens=8),
    engine=EngineSettings(max_model_len=64, max_num_seqs=2),
    chat_template=False,
    max_prompt_tokens=16,
    held_out=0.5,
    vllm="1.2",
    part_prompts=2,
    weights_sample_sha256="aa",
)


def row(text: str, answer: int = 3) -> Row:
    """A prompt of two tokens with an answer of some tokens."""
    identifier = prompt_id([{"role": "user", "content": text}])
    return {
        "prompt_id": identifier,
        "split_id": identifier,
        "category": text,
        "input_ids": list(range(2 + answer)),
        "loss_spans": [[2, 2 + answer]] if answer else [],
        "finish_reason": "stop",
    }


ROWS = [row(str(number), answer=number % 4) for number in range(12)]


def run_file(rows: Sequence[Row] = ROWS, **changes: Any) -> RunFile:
    settings = SETTINGS.model_copy(update=changes)
    digest = digest_of([row["prompt_id"] for row in rows])
    return RunFile(settings=settings, prompts_sha256=digest)


def answered(folder: Path, rows: Sequence[Row] = ROWS, **changes: Any) -> Store:
    """A folder with all parts, not finished."""
    store = Store(folder)
    store.start(run_file(rows, **changes))
    for number in range(0, len(rows), 2):
        store.write_part(rows[number : number + 2])
    return store


def finish(store: Store, rows: Sequence[Row] = ROWS, **changes: Any) -> Provenance:
    counts = PromptCounts(read=len(rows), duplicates_dropped=0, too_long_dropped=0)
    run = run_file(rows, **changes)
    return store.finish(
        [row["prompt_id"] for row in rows], run, counts, {"vllm": "1.2"}
    )


def finished(folder: Path, rows: Sequence[Row] = ROWS, **changes: Any) -> Path:
    finish(answered(folder, rows, **changes), rows, **changes)
    return folder


def parts(store: Store) -> list[Path]:
    return sorted(store.folder.glob("parts/*.jsonl"))


def contents(folder: Path) -> dict[str, list[Any]]:
    return {split: list(read_split(folder, split)) for split in SPLITS}


def test_rows_come_back_in_order_without_empty_answers(tmp_path: Path) -> None:
    provenance = finish(answered(tmp_path / "a"))
    found = contents(tmp_path / "a")
    whole = [row for row in ROWS if row["loss_spans"]]
    assert len(found[TRAIN]) > 1
    assert len(found[HELD_OUT]) > 1
    for rows in found.values():
        assert rows == [row for row in whole if row in rows]
    assert sum(map(len, found.values())) == len(whole) == 9
    assert provenance.empty_answers_dropped == 3
    assert provenance == read_provenance(tmp_path / "a")
    for split, rows in found.items():
        counts = provenance.splits[split]
        assert counts.rows == len(rows)
        assert counts.tokens == sum(len(row["input_ids"]) for row in rows)
        spans = [span for row in rows for span in row["loss_spans"]]
        assert counts.answer_tokens == sum(end - start for start, end in spans)


@settings(max_examples=5)
@given(st.permutations(ROWS), st.integers(1, 12))
def test_the_order_in_which_answers_end_changes_no_byte(
    tmp_path_factory: pytest.TempPathFactory, ended: list[Row], size: int
) -> None:
    folder = tmp_path_factory.mktemp("order")
    store = Store(folder / "a")
    store.start(run_file())
    for begin in range(0, len(ended), size):
        store.write_part(ended[begin : begin + size])
    finish(store)
    finished(folder / "b")
    a, b = (
        {
            str(path.relative_to(folder / name)): path.read_bytes()
            for path in (folder / name).rglob("*")
            if path.is_file()
        }
        for name in "ab"
    )
    assert a == b
    assert len(a) >= 5
    shutil.rmtree(folder)


def test_a_part_that_was_removed_is_answered_again(tmp_path: Path) -> None:
    store = answered(tmp_path / "a")
    prompts = {row["prompt_id"]: row["input_ids"][:2] for row in ROWS}
    parts(store)[1].unlink()
    left = store.answered(prompts)
    assert left == {row["prompt_id"] for row in ROWS[:2] + ROWS[4:]}
    store.write_part(ROWS[2:4])
    assert parts(store)[-1].name == "000006.jsonl"
    finish(store)
    assert contents(store.folder) == contents(finished(tmp_path / "b"))


def test_nothing_but_the_result_stays(tmp_path: Path) -> None:
    names = {path.name for path in finished(tmp_path / "a").iterdir()}
    assert names == {
        "run.json", "generation.json", "dataset_dict.json", "train", "held_out"
    }  # fmt: skip


texts = st.lists(st.text(max_size=4), min_size=1, max_size=12, unique=True)


@settings(max_examples=15)
@given(texts, texts, st.randoms(), st.floats(0, 0.99))
def test_adding_prompts_never_moves_another_one(
    tmp_path_factory: pytest.TempPathFactory,
    few: list[str],
    more: list[str],
    random: Any,
    held_out: float,
) -> None:
    many = list({*few, *more})
    random.shuffle(many)
    sides = []
    for chosen in (few, many):
        folder = tmp_path_factory.mktemp("split") / "a"
        finished(folder, [row(text) for text in chosen], held_out=held_out)
        counts = read_provenance(folder).splits
        sides.append(
            {
                found["category"]: split
                for split in SPLITS
                if counts[split].rows
                for found in read_split(folder, split)
            }
        )
        shutil.rmtree(folder)
    assert set(sides[0]) == set(few)
    assert set(sides[1]) == set(many)
    assert sides[0].items() <= sides[1].items()


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def test_a_full_disk_is_named_and_the_run_goes_on_later(tmp_path: Path) -> None:
    """Wherever the room ends: at the start, in a part, or in the dataset."""
    expected = contents(finished(tmp_path / "whole"))
    for room in (0, 50, 1000, 1500):
        folder = tmp_path / f"{room}"
        with no_file_above(room), pytest.raises(OutputError) as caught:
            finished(folder)
        assert str(folder) in str(caught.value)
        assert "cannot be written" in str(caught.value)
        with pytest.raises(DataError, match=r"not finished|no generation\.json"):
            read_provenance(folder)
        assert contents(finished(folder)) == expected


def test_a_folder_that_may_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/out: cannot be written"):
        Store(tmp_path / "file" / "out").start(run_file())


@pytest.mark.parametrize(
    "moment",
    [
        "datasets.Dataset.from_generator",
        "datasets.DatasetDict.save_to_disk",
        "vllm_mtp.data.store._count",
        "vllm_mtp.data.store.write_whole",
        "vllm_mtp.data.store.shutil.rmtree",
    ],
)
def test_a_kill_while_the_dataset_is_written(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(finished(tmp_path / "whole"))
    store = answered(tmp_path / "killed")
    # As a kill leaves them: half a dataset and the library's cache.
    for left in ("train", "held_out", ".cache-abc"):
        (store.folder / left).mkdir()
        (store.folder / left / "data-00000-of-00001.arrow").write_bytes(b"half")

    remove = shutil.rmtree

    def kill(*arguments: Any, **options: Any) -> None:
        if moment.endswith("rmtree") and Path(arguments[0]).name != "parts":
            return remove(*arguments, **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(moment, kill)
        with pytest.raises(Killed):
            finish(store)
    # The parts are removed only once the folder is finished.
    assert store.is_finished == moment.endswith("rmtree")
    assert len(parts(store)) == 6
    if not store.is_finished:
        finish(store)
    assert contents(store.folder) == expected
    assert not list(store.folder.glob(".cache-*"))


def test_a_part_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "a")
    store.start(run_file())

    def kill(_: int) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("vllm_mtp.data.store.os.fsync", kill)
        with pytest.raises(Killed):
            store.write_part(ROWS[:2])
    prompts = {row["prompt_id"]: row["input_ids"][:2] for row in ROWS}
    assert not parts(store)
    assert not store.answered(prompts)
    store.write_part(ROWS[:2])
    assert [path.name for path in parts(store)] == ["000000.jsonl"]
    assert store.answered(prompts) == {row["prompt_id"] for row in ROWS[:2]}


def test_a_kill_at_the_very_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "a")

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("vllm_mtp.data.store.os.replace", kill)
        with pytest.raises(Killed):
            store.start(run_file())
    assert any(store.folder.iterdir())
    store.start(run_file())
    assert store.check(SETTINGS) == SETTINGS


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"held_out": 0.25}, "held_out: the folder has 0.5, this run has 0.25"),
        ({"vllm": "1.3"}, "vllm: the folder has '1.2', this run has '1.3'"),
        (
            {"source": SourceSettings(prompts="q.jsonl")},
            "source.prompts: the folder has 'p.jsonl', this run has 'q.jsonl'",
        ),
        (
            {"sampling": SamplingSettings(max_tokens=8, seed=1)},
            "sampling.seed: the folder has 0, this run has 1",
        ),
        (
            {"target": FACTS.model_copy(update={"hidden_size": 32})},
            "target.hidden_size: the folder has 64, this run has 32",
        ),
        (
            {"weights_sample_sha256": "bb"},
            "weights_sample_sha256: the folder has 'aa', this run has 'bb'",
        ),
    ],
)
@pytest.mark.parametrize("done", [False, True])
def test_other_settings_are_refused_by_key(
    changes: dict[str, Any], line: str, done: bool, tmp_path: Path
) -> None:
    store = Store(finished(tmp_path / "a")) if done else answered(tmp_path / "a")
    with pytest.raises(DataError) as error:
        store.check(SETTINGS.model_copy(update=changes))
    flags = ["Of sampling, these flags go on with it: --seed 0"]
    assert str(error.value).splitlines()[1:] == [
        f"  {line}",
        *(flags if "sampling." in line else []),
        "Use the settings that it has, or name another folder",
    ]


def test_the_same_target_elsewhere_is_the_same(tmp_path: Path) -> None:
    moved = SETTINGS.model_copy(
        update={"target": FACTS.model_copy(update={"name": "/elsewhere"})}
    )
    assert answered(tmp_path / "a").check(moved) == SETTINGS


def test_a_folder_of_the_first_version_goes_on_with_its_own_parts(
    tmp_path: Path,
) -> None:
    store = answered(tmp_path / "a")
    path = store.folder / "run.json"
    old = json.loads(path.read_text())
    del old["settings"]["part_prompts"], old["settings"]["weights_sample_sha256"]
    path.write_text(json.dumps(old))
    found = store.check(SETTINGS)
    assert found.part_rows == 8  # four times max_num_seqs
    assert SETTINGS.part_rows == 2
    assert found.weights_sample_sha256 is None
    store.start(run_file(**dict(found)))


def test_changed_prompts_are_refused(tmp_path: Path) -> None:
    store = answered(tmp_path / "a")
    with pytest.raises(DataError, match="prompts_sha256.*source's contents changed"):
        store.start(run_file(ROWS[:-1]))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_not_ours_is_left_alone(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    if kind == "folder":
        path.mkdir()
        (path / "thesis.txt").write_text("x")
    else:
        path.write_text("x")
    with pytest.raises(DataError, match="exists and is not a folder of"):
        Store(path).start(run_file())
    (tmp_path / "empty").mkdir()
    Store(tmp_path / "empty").start(run_file())


def test_a_newer_version_s_file_is_refused(tmp_path: Path) -> None:
    store = answered(tmp_path / "a")
    path = store.folder / "run.json"
    path.write_text(path.read_text().replace('"vllm"', '"wings": 2, "vllm"'))
    with pytest.raises(DataError, match=r"(?s)run\.json: not a file that.*wings"):
        store.check(SETTINGS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_temperature_is_a_number(value: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        SamplingSettings(temperature=value)


def test_read_split_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no generation\.json; expected a folder"):
        read_split(tmp_path)
    started = answered(tmp_path / "started").folder
    with pytest.raises(DataError, match="not finished.*the same .* command again"):
        read_split(started)
    folder = finished(tmp_path / "a", held_out=0.0)
    with pytest.raises(DataError, match="no split 'test'; it has train, held_out"):
        read_split(folder, "test")
    with pytest.raises(DataError, match="'held_out' has no rows.*--held-out"):
        read_split(folder, HELD_OUT)
    assert len(read_split(folder, TRAIN)) == 9
    shutil.rmtree(folder / "train")
    with pytest.raises(DataError, match="a/train: cannot be read"):
        read_split(folder, TRAIN)


def test_a_folder_of_empty_answers_can_be_finished(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a", [row("a", 0), row("b", 0)])
    assert read_provenance(folder).empty_answers_dropped == 2
    with pytest.raises(DataError, match="'train' has no rows"):
        read_split(folder)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"name": "copy"}, None),
        ({"weights_fingerprint": None}, None),
        ({"weights_fingerprint": "11ee"}, "weights_fingerprint"),
        ({"hidden_size": 32}, "hidden_size"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters"),
    ],
)
def test_answers_of_another_target_are_refused(
    changes: dict[str, Any], key: str | None, tmp_path: Path
) -> None:
    folder = finished(tmp_path / "a")
    facts = FACTS.model_copy(update=changes)
    if key is None:
        require_made_by(folder, facts)
        return
    with pytest.raises(DataError, match=rf"'tiny', got .*differ in {key}\. Use that"):
        require_made_by(folder, facts)


def test_require_made_by_wants_a_finished_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not finished"):
        require_made_by(answered(tmp_path / "a").folder, FACTS)


def fine_tune(target: Path, folder: Path, name: str) -> Path:
    """A copy of a target with one weight changed."""
    shutil.copytree(target, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name] + 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.3.input_layernorm.weight"]
)
def test_answers_of_a_fine_tune_are_refused(name: str, tmp_path: Path) -> None:
    target = make_tiny_llama(tmp_path / "target")
    facts = TargetFacts.from_folder(target)
    made_by = {"target": facts, "weights_sample_sha256": weights_sample_sha256(target)}
    new = finished(tmp_path / "new", **made_by)
    old = finished(tmp_path / "old", target=facts, weights_sample_sha256=None)
    other = fine_tune(target, tmp_path / "other", name)
    assert TargetFacts.from_folder(other).weights_fingerprint == (
        facts.weights_fingerprint
    )
    require_made_by(new, facts, target)
    require_made_by(old, facts, other)  # it does not say which it was
    require_made_by(new, facts)
    with pytest.raises(DataError, match="weights_sample_sha256"):
        require_made_by(new, facts, other)


def test_the_sample_does_not_depend_on_the_files(tmp_path: Path) -> None:
    target = make_tiny_llama(tmp_path / "target")
    weights = load_file(target / "model.safetensors")
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for number, (name, weight) in enumerate(reversed(weights.items())):
        shards[number % 2][name] = weight
    (tmp_path / "shards").mkdir()
    for number, shard in enumerate(shards):
        save_file(shard, tmp_path / "shards" / f"model-{number}.safetensors")
    found = weights_sample_sha256(target)
    assert found is not None
    assert weights_sample_sha256(tmp_path / "shards") == found
    assert weights_sample_sha256(tmp_path) is None


def test_a_cut_file_has_no_sample(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b'{"a":')
    with pytest.raises(UnsupportedTargetError, match="not a whole safetensors file"):
        weights_sample_sha256(tmp_path)


@pytest.mark.parametrize("wrong", [512, -1])
def test_tokens_that_the_target_has_not_are_found_when_read(
    tmp_path: Path, wrong: int
) -> None:
    """In the last row, so that every one was looked at."""
    odd = row("odd")
    odd["input_ids"] = [511, 0, wrong, 5, 6]
    rows = [row("fine"), row("fine too"), row("and this"), odd]
    folder = finished(tmp_path / "f", rows, held_out=0.0)
    with pytest.raises(DataError, match=f"holds the token {wrong}, .* has 512 rows"):
        read_split(folder, TRAIN)
