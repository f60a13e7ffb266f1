# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp generate`` from its flags to its files, with an engine that only copies.

The real one is in `test_resume`.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from transformers import GptOssConfig

from tests.data.conftest import (
    ASSISTANT,
    BEGIN,
    USER,
    WriteJsonl,
    WriteShareGPT,
    generate_command,
    make_tokenizer,
)
from tests.data.test_tasks import conversation
from tests.tiny_targets import make_tiny_llama
from vllm_mtp.cli.main import main
from vllm_mtp.data.answerer import answering, sampling_params
from vllm_mtp.data.generation import Answer
from vllm_mtp.data.progress import Progress, time_text
from vllm_mtp.data.render import Request
from vllm_mtp.data.served_sampling import difference_from_served
from vllm_mtp.data.settings import (
    EngineSettings,
    MachineSettings,
    PromptCounts,
    SamplingSettings,
)
from vllm_mtp.data.store import SPLITS, Store, read_provenance, read_split
from vllm_mtp.engine import FrontEnd
from vllm_mtp.errors import DataError

datasets = pytest.importorskip("datasets")

END_ID = 300  # of the fake engine's answers


class FakeEngine:
    """Repeats each prompt and stops, some at once; raises what it is told to."""

    calls: list[list[str]]
    before_call: Callable[[], None]

    def __init__(
        self,
        target: Path,
        settings: EngineSettings,
        sampling: SamplingSettings,
        machine: MachineSettings,
    ) -> None:
        self._longest = sampling.max_tokens
        self._at_once = settings.max_num_seqs

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        waiting = iter(requests)
        while batch := list(islice(waiting, self._at_once)):
            type(self).before_call()
            self.calls.append([request.prompt_id for request in batch])
            for request in reversed(batch):  # the last one ends first
                yield request, self._answer(request.token_ids)

    def _answer(self, prompt: list[int]) -> Answer:
        if len(prompt) >= self._longest:
            return Answer(prompt[: self._longest], "length")
        return Answer([*prompt, END_ID], "stop")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    """What was asked of the engine."""
    FakeEngine.calls, FakeEngine.before_call = [], lambda: None
    monkeypatch.setattr("vllm_mtp.data.answerer.answering", FakeEngine)
    monkeypatch.setattr("vllm_mtp.engine.vllm_version", lambda: "1.2")
    return FakeEngine


Run = Callable[..., int]


@pytest.fixture
def run(
    engine: type[FakeEngine],
    chat_target: Path,
    write_jsonl: WriteJsonl,
    tmp_path: Path,
) -> Run:
    """The command on ten prompts in parts of four, unless told otherwise."""
    prompts = write_jsonl([{"prompt": f"number {n}"} for n in range(10)])
    defaults: dict[str, object] = {
        "target": chat_target,
        "prompts": prompts,
        "out": tmp_path / "out",
        "max_prompt_tokens": 64,
        "max_tokens": 32,
        "max_num_seqs": 4,
        "held_out": 0.5,
    }

    def run(*switches: str, **changes: object) -> int:
        return main(generate_command(*switches, **(defaults | changes)))

    return run


def rows(folder: Path) -> list[dict[str, Any]]:
    counts = read_provenance(folder).splits
    return [
        dict(found)
        for split in SPLITS
        if counts[split].rows
        for found in read_split(folder, split)
    ]


def test_the_files_and_the_report(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    found = rows(tmp_path / "out")
    assert len(found) == 10
    tokenizer = make_tokenizer()
    for row in found:
        ((start, end),) = row["loss_spans"]
        prompt, answer = row["input_ids"][:start], row["input_ids"][start:]
        assert end == len(row["input_ids"])
        assert answer == [*prompt, END_ID]
        text = tokenizer.decode(prompt)
        assert text.startswith(f"{BEGIN}{USER}number ")
        assert text.endswith(ASSISTANT)
        assert (row["category"], row["finish_reason"]) == ("prompts", "stop")
    provenance = read_provenance(tmp_path / "out")
    assert provenance.settings.part_prompts == 4
    assert provenance.settings.weights_sample_sha256 is not None
    assert provenance.versions["vllm"] == "1.2"
    out = capsys.readouterr().out
    assert "10 prompts, 10 of them to answer" in out
    assert f"written to {tmp_path / 'out'}" in out


def test_a_long_answer_is_cut_and_has_no_end(run: Run, tmp_path: Path) -> None:
    assert run(max_tokens=5) == 0
    for row in rows(tmp_path / "out"):
        ((start, end),) = row["loss_spans"]
        assert (end - start, row["finish_reason"]) == (5, "length")


def test_raw_texts(run: Run, tmp_path: Path) -> None:
    assert run("--no-chat-template") == 0
    row = rows(tmp_path / "out")[0]
    prompt = row["input_ids"][: row["loss_spans"][0][0]]
    assert make_tokenizer().decode(prompt).startswith(f"{BEGIN}number ")
    assert read_provenance(tmp_path / "out").settings.chat_template is False


def test_a_dataset_as_the_source(run: Run, tmp_path: Path) -> None:
    source = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "kind": [1, 2, 3]})
    source.save_to_disk(str(tmp_path / "source"))
    flags = {"prompts": f"hf:{tmp_path / 'source'}", "limit": 2}
    flags |= {"prompts_column": "text", "prompts_category_column": "kind"}
    assert run(**flags) == 0
    assert sorted(row["category"] for row in rows(tmp_path / "out")) == ["1", "2"]


def test_what_is_dropped_is_counted(
    run: Run,
    engine: type[FakeEngine],
    write_jsonl: WriteJsonl,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = ["a", "b", "a", "x" * 100, "a", "c", "empty", "cut"]
    write_jsonl([{"prompt": text} for text in texts])
    special = {
        len("empty"): Answer([END_ID], "stop"),
        len("cut"): Answer([], "length"),
    }
    extra = 4  # the template's tokens
    original = engine._answer
    monkeypatch.setattr(
        engine,
        "_answer",
        lambda self, ids: special.get(len(ids) - extra) or original(self, ids),
    )
    assert run() == 0
    provenance = read_provenance(tmp_path / "out")
    counts = provenance.prompts
    assert counts == PromptCounts(read=8, duplicates_dropped=2, too_long_dropped=1)
    assert provenance.empty_answers_dropped == 2
    assert len(rows(tmp_path / "out")) == 3
    out = capsys.readouterr().out.split("\n")
    for name, number in [
        ("rows read", 8),
        ("duplicates dropped", 2),
        ("too long, dropped", 1),
        ("empty answers dropped", 2),
    ]:
        assert f"  {name:<21} {number}" in out


def test_kinds_without_a_held_out_row_are_named(
    run: Run,
    write_jsonl: WriteJsonl,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kinds = ("code", "maths", "roleplay")
    write_jsonl([{"prompt": f"n {n}", "category": kinds[n % 3]} for n in range(9)])
    for held_out in (0.01, 0.1, 0.5):
        out = tmp_path / str(held_out)
        assert run(out=out, held_out=held_out) == 0
        counts = read_provenance(out).splits
        found = read_split(out, "held_out") if counts["held_out"].rows else ()
        held = {row["category"] for row in found}
        missing = [kind for kind in kinds if kind not in held]
        said = capsys.readouterr().out
        assert ("no row held out of" in said) == bool(missing)
        assert f"no row held out of: {', '.join(missing)} (" in said or not missing
    assert held == set(kinds)
    assert run(out=tmp_path / "none", held_out=0) == 0
    assert "no row held out" not in capsys.readouterr().out


def test_a_conversation_is_held_out_in_each_run(
    run: Run, chat_target: Path, write_sharegpt: WriteShareGPT, tmp_path: Path
) -> None:
    """Of `sharegpt` and of what is made of the same conversations."""
    later = ("human", "And then, what came of the town?")
    write_sharegpt([[*conversation(number), later] for number in range(12)])
    target = tmp_path / "long"
    shutil.copytree(chat_target, target)
    config = json.loads((target / "config.json").read_text())
    config["max_position_embeddings"] = 4096
    (target / "config.json").write_text(json.dumps(config))
    sides: dict[str, dict[str, set[str]]] = {}
    for source in ("sharegpt", "sharegpt:later", "sharegpt:tasks"):
        out = tmp_path / source
        flags = {"prompts": source, "max_prompt_tokens": 4000, "held_out": 0.4}
        assert run(out=out, target=target, **flags) == 0
        sides[source] = {
            split: {row["split_id"] for row in read_split(out, split)}
            for split in SPLITS
        }
    firsts = sides["sharegpt"]
    assert min(len(found) for found in firsts.values()) > 1
    assert sum(len(found) for found in firsts.values()) == 12
    assert sides["sharegpt:later"] == firsts
    for split, other in (("train", "held_out"), ("held_out", "train")):
        assert firsts[split] <= sides["sharegpt:tasks"][split]
        assert not firsts[split] & sides["sharegpt:tasks"][other]


def test_shards_answer_all_prompts_once_and_go_on_by_themselves(
    run: Run,
    engine: type[FakeEngine],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt() -> None:
        if len(engine.calls) == 1:
            raise KeyboardInterrupt

    assert run(out=tmp_path / "whole") == 0
    whole = rows(tmp_path / "whole")
    found = []
    for shard in ("1/2", "2/2"):
        out = tmp_path / shard.replace("/", "-")
        engine.calls.clear()
        engine.before_call = interrupt
        assert run(out=out, shard=shard) == 130
        engine.before_call = lambda: None
        capsys.readouterr()
        assert run(out=out, shard="1/3") == 1
        assert f"source.shard: the folder has '{shard}'" in capsys.readouterr().err
        assert run(out=out, shard=shard) == 0
        assert f"  {'in other shards':<21} 5\n" in capsys.readouterr().out
        found += rows(out)
    assert sorted(found, key=str) == sorted(whole, key=str)
    assert run(shard="11/12", out=tmp_path / "more") == 1
    assert "fewer prompts than shards" in capsys.readouterr().err
    assert run(shard="3-8", out=tmp_path / "more") == 1
    assert "--shard: got '3-8', expected" in capsys.readouterr().err


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
LAST = {"role": "user", "content": "e"}
ODD_ROWS = [
    {"prompt": "a"},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": [IMAGE]}]},
    {"prompt": "b", "category": "\ud83d"},
    {"prompt": "x" * 100},
    {"prompt": "c"},
    {
        "messages": [
            {"role": "system", "content": "d"},
            {"role": "user", "content": "e"},
        ]
    },
    {"prompt": "b", "category": "\ud83d"},
]


def test_odd_rows_are_skipped_and_explained(
    run: Run,
    write_jsonl: WriteJsonl,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_jsonl(ODD_ROWS)
    assert run() == 0
    counts = read_provenance(tmp_path / "out").prompts
    assert (counts.read, counts.kept, counts.too_long_dropped) == (8, 2, 1)
    assert counts.odd_skipped == {
        "half of a character": 2,
        "content is null or missing": 1,
        "content has a part that is no text ('image_url')": 1,
        "the target's chat template refuses it": 1,
    }
    out = capsys.readouterr().out
    assert f"  {'odd, skipped':<21} 5\n" in out
    assert f"    2 x half of a character (first: {path}, line 4: " in out
    assert f"    1 x too long (first: {path}, line 5: 104 tokens" in out
    # What the target is given, for the user to look at.
    assert f"the first prompt, 5 tokens:\n{BEGIN}{USER}a" in out


def test_strict_stops_at_the_first_odd_row(
    run: Run,
    engine: type[FakeEngine],
    write_jsonl: WriteJsonl,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    too_long = {"prompt": "x" * 100}
    assert too_long in ODD_ROWS
    for row in [row for row in ODD_ROWS[1:5] if row != too_long]:
        path = write_jsonl([ODD_ROWS[0], too_long, row])
        assert run("--strict") == 1
        error = capsys.readouterr().err
        assert error.startswith(f"vllm-mtp generate: {path}, line 3: ")
        assert error.count("\n") == 1
    assert not engine.calls
    assert not (tmp_path / "out").exists()


def test_odd_rows_alone_are_one_line(
    run: Run, write_jsonl: WriteJsonl, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(ODD_ROWS[1:4])
    assert run() == 1
    error = capsys.readouterr().err
    assert "nothing to answer: 3 rows read; 1 x content is null or missing" in error
    assert error.count("\n") == 1


class TestSampling:
    """What `vllm serve` samples with where a request does not say."""

    OWN: ClassVar[dict[str, Any]] = {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "min_p": 0.1,
        "repetition_penalty": 1.3,
        "max_new_tokens": 9,
    }

    @pytest.fixture
    def target(self, chat_target: Path, tmp_path: Path) -> Path:
        folder = tmp_path / "own"
        shutil.copytree(chat_target, folder)
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | self.OWN))
        return folder

    def used(self, folder: Path) -> SamplingSettings:
        return read_provenance(folder).settings.sampling

    def test_the_targets_defaults_are_taken_and_said(
        self,
        run: Run,
        target: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert run(target=target, max_tokens=None) == 0
        own = {name: value for name, value in self.OWN.items() if "max" not in name}
        assert self.used(tmp_path / "out") == SamplingSettings(max_tokens=9, **own)
        out = capsys.readouterr().out
        assert "sampling: max_tokens 9, temperature 0.7, top_p 0.8" in out
        assert "own defaults" in out

    @pytest.mark.parametrize("only", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.2}])
    def test_a_target_that_only_filters_is_served_at_temperature_1(
        self, run: Run, chat_target: Path, tmp_path: Path, only: dict[str, Any]
    ) -> None:
        target = tmp_path / "filters"
        shutil.copytree(chat_target, target)
        # transformers leaves out what it has as a default too.
        (target / "generation_config.json").write_text(
            json.dumps(only | {"temperature": 1.0})
        )
        assert run(target=target) == 0
        expected = SamplingSettings(max_tokens=32, temperature=1.0, **only)
        assert self.used(tmp_path / "out") == expected
        assert difference_from_served(expected, target) is None

    def test_greedy_answers_name_no_setting_of_sampling(
        self, run: Run, target: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(target=target, temperature=0) == 0
        (said,) = [
            line
            for line in capsys.readouterr().out.splitlines()
            if "the target's own defaults" in line
        ]
        assert ": repetition_penalty (" in said
        assert "top_p" not in said

    @pytest.mark.parametrize("held", ["[1]", "7", '"a"'])
    def test_a_file_that_holds_no_settings_is_one_line(
        self, run: Run, target: Path, held: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = target / "generation_config.json"
        path.write_text(held)
        assert run(target=target) == 1
        error = capsys.readouterr().err
        assert f"{path}: cannot be used (" in error
        assert error.count("\n") == 1
        with pytest.raises(DataError, match="json: cannot be used .*expected a JSON"):
            difference_from_served(SamplingSettings(), target)

    def test_a_folder_with_other_ends_reaches_the_engine(
        self, run: Run, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = tmp_path / "other"
        other.mkdir()
        shutil.copy(target / "generation_config.json", other)
        assert run(generation_config=other) == 0
        settings = read_provenance(tmp_path / "out").settings
        started: dict[str, Any] = {}

        @contextmanager
        def start(_: Path, **given: Any) -> Iterator[SimpleNamespace]:
            started.update(given)
            yield SimpleNamespace(llm_engine=None)

        monkeypatch.setattr("vllm_mtp.engine.start", start)
        with answering(target, settings.engine, settings.sampling, MachineSettings()):
            assert started["generation_config"] == str(other)
        assert run(generation_config="vllm", out=tmp_path / "none") == 0
        engine = read_provenance(tmp_path / "none").settings.engine
        assert engine.generation_config == "auto"

    def test_a_run_begun_without_the_defaults_is_kept_by_flags(
        self, run: Run, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As folders of earlier versions were: the same command takes others now."""
        assert run("--generation-config", "vllm", target=target) == 0
        path = tmp_path / "out" / "generation.json"
        before = read_provenance(path.parent)
        path.unlink()  # a run that was stopped
        assert run(target=target) == 1
        error = capsys.readouterr().err
        assert "sampling.temperature: the folder has 0.0, this run has 0.7" in error
        flags = error.rsplit("these flags go on with it: ")[1].splitlines()[0].split()
        assert flags[:2] == ["--temperature", "0.0"]
        assert run(*flags, target=target) == 0
        assert read_provenance(path.parent).settings == before.settings

    def test_flags_win(
        self,
        run: Run,
        target: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert run(target=target, temperature=0, top_k=0, frequency_penalty=0.5) == 0
        used = self.used(tmp_path / "out")
        assert (used.temperature, used.top_k, used.max_tokens) == (0, 0, 32)
        assert (used.repetition_penalty, used.frequency_penalty) == (1.3, 0.5)
        own = "applies too: repetition_penalty ("
        assert own in capsys.readouterr().out
        # Greedy answers are penalised too, as vLLM does.
        asked = sampling_params(used, "ab")
        assert (asked.temperature, asked.top_p, asked.min_p) == (0, 1, 0)
        assert (asked.repetition_penalty, asked.frequency_penalty) == (1.3, 0.5)

    def test_none_are_taken_if_told(
        self, run: Run, target: Path, tmp_path: Path
    ) -> None:
        assert run(target=target, generation_config="vllm") == 0
        assert self.used(tmp_path / "out") == SamplingSettings(max_tokens=32)

    @pytest.mark.parametrize("value", ["x", -1, 3])
    def test_a_default_that_nothing_can_sample_with(
        self,
        run: Run,
        target: Path,
        value: object,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        path = target / "generation_config.json"
        path.write_text(json.dumps({"top_p": value}))
        assert run(target=target) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_the_mode_of_the_tokenizer_reaches_the_engine(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tokenizer_mode="hf", chat_template_kwargs='{"mood": "calm"}') == 0
    settings = read_provenance(tmp_path / "out").settings
    assert settings.engine.tokenizer_mode == "hf"
    assert settings.chat_template_kwargs == {"mood": "calm"}
    assert run(chat_template_kwargs='{"mood": "calm"}') == 1
    assert "engine.tokenizer_mode: the folder has 'hf'" in capsys.readouterr().err
    assert run(tokenizer_mode="none-such", out=tmp_path / "other") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_arguments_of_the_template_are_json(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(chat_template_kwargs="[1]") == 1
    assert "--chat-template-kwargs: got '[1]', expected" in capsys.readouterr().err


def test_a_target_with_a_format_of_its_own_is_refused(
    run: Run, chat_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The chat endpoint leaves gpt-oss's chat template aside."""
    target = tmp_path / "gpt-oss"
    shutil.copytree(chat_target, target)
    GptOssConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=256,
        architectures=["GptOssForCausalLM"],
    ).save_pretrained(target)
    assert run(target=target) == 1
    error = capsys.readouterr().err
    assert f"--target {target}: `vllm serve` writes gpt-oss's conversations" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert run("--no-chat-template", target=target) == 0


def test_nothing_to_answer(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(max_prompt_tokens=3) == 1
    error = capsys.readouterr().err
    assert "10 rows read; 10 x too long (first: " in error
    assert "prompts.jsonl, line 1: 12 tokens, --max-prompt-tokens is 3)" in error
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_goes_on_where_it_was(
    run: Run,
    engine: type[FakeEngine],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(out=tmp_path / "whole") == 0
    whole, engine.calls = engine.calls, []

    def interrupt() -> None:
        if engine.calls:
            raise KeyboardInterrupt

    engine.before_call = interrupt
    assert run() == 130
    error = capsys.readouterr().err
    assert f"the same command goes on with what is in {tmp_path / 'out'}" in error
    assert "Traceback" not in error
    engine.before_call = lambda: None
    assert run() == 0
    assert engine.calls == whole
    assert "10 prompts, 6 of them to answer" in capsys.readouterr().out
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")


@pytest.mark.parametrize("empty", [False, True])
def test_parts_of_another_rendering_are_not_mixed(
    run: Run,
    engine: type[FakeEngine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    empty: bool,
) -> None:
    """The template is the same, and prints the date."""
    if empty:
        monkeypatch.setattr(engine, "_answer", lambda *_: Answer([END_ID], "stop"))

    def interrupt() -> None:
        if len(engine.calls) == 2:
            raise KeyboardInterrupt

    engine.before_call = interrupt
    assert run() == 130
    engine.before_call = lambda: None
    render = FrontEnd.render
    monkeypatch.setattr(FrontEnd, "render", lambda *a: f"Tuesday {render(*a)}")
    parts = tmp_path / "out" / "parts"
    for part in ("000000.jsonl", "000001.jsonl"):
        capsys.readouterr()
        assert run() == 1
        error = capsys.readouterr().err
        assert f"{parts / part}: a prompt of it was rendered as other" in error
        assert error.count("\n") == 1
        (parts / part).unlink()
    assert run() == 0


def test_a_finished_folder_does_nothing(
    run: Run,
    engine: type[FakeEngine],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run() == 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    engine.calls.clear()
    assert run() == 0
    assert "finished already; nothing to do" in capsys.readouterr().out
    assert not engine.calls
    assert {path: path.stat().st_mtime_ns for path in files} == before


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        ({"max_tokens": 16}, ["sampling.max_tokens", "engine.max_model_len"]),
        ({"temperature": 0.5, "seed": 2}, ["sampling.temperature", "sampling.seed"]),
        ({"max_num_seqs": 8}, ["engine.max_num_seqs"]),
        ({"held_out": 0.25}, ["held_out"]),
        ({"dtype": "float32"}, ["engine.dtype"]),
    ],
)
def test_other_flags_on_the_same_folder_are_refused(
    run: Run,
    flags: dict[str, object],
    keys: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run() == 0
    capsys.readouterr()
    assert run(**flags) == 1
    lines = [ln for ln in capsys.readouterr().err.splitlines() if ln[:2] == "  "]
    assert sorted(line.split(":")[0].strip() for line in lines) == sorted(keys)


def test_another_target_or_template_on_the_same_folder_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    make_tiny_llama(tmp_path / "other", num_hidden_layers=3)
    tokenizer.save_pretrained(tmp_path / "other")
    assert run(target=tmp_path / "other") == 1
    error = capsys.readouterr().err
    assert "target.num_hidden_layers: the folder has 4, this run has 3" in error
    assert "chat_template_sha256" in error
    assert "target.name" not in error


def test_changed_prompts_are_refused(
    run: Run,
    engine: type[FakeEngine],
    write_jsonl: WriteJsonl,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    engine.before_call = interrupt
    assert run() == 130
    write_jsonl([{"prompt": "another one"}])
    assert run() == 1
    assert "the source's contents changed" in capsys.readouterr().err


def test_a_folder_of_the_first_version_keeps_its_part_size(
    run: Run,
    engine: type[FakeEngine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(out=tmp_path / "new") == 0
    settings = json.loads((tmp_path / "new" / "run.json").read_text())
    del settings["settings"]["part_prompts"]
    del settings["settings"]["weights_sample_sha256"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps(settings))
    engine.calls.clear()
    sizes: list[int] = []
    write = Store.write_part
    monkeypatch.setattr(
        Store, "write_part", lambda s, rows: (sizes.append(len(rows)), write(s, rows))
    )
    assert run() == 0
    assert sizes == [10]  # of 16
    assert read_provenance(tmp_path / "out").settings.part_prompts is None
    assert rows(tmp_path / "out") == rows(tmp_path / "new")


def test_an_estimate_before_the_bulk(
    run: Run, engine: type[FakeEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    printed: list[str] = []
    engine.before_call = lambda: printed.append(capsys.readouterr().out)
    assert run() == 0
    assert "estimating from the first 4 answers" in printed[0]
    assert "estimate: 4 answers took" not in printed[0]
    assert "estimate: 4 answers took" in printed[1]
    assert "the other 6 will take about" in printed[1]
    # Once is enough.
    assert "estimate:" not in printed[2] + capsys.readouterr().out


def test_no_estimate_where_all_are_answered_at_once(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(max_num_seqs=16) == 0
    out = capsys.readouterr().out
    assert "estimating from" not in out
    assert "estimate:" not in out


def test_the_estimate_waits_for_the_longest_of_the_first_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = 0.0
    monkeypatch.setattr("vllm_mtp.data.progress.time.perf_counter", lambda: seconds)
    requests = [Request(f"{n}", "", [0] * 50) for n in range(1000)]
    missing = requests[500:]
    with Progress(requests, missing, 100) as progress:
        seconds = 10.0
        for request in missing[1:200]:
            progress.answered(request, 100)
        assert len(capsys.readouterr().out.splitlines()) == 1
        seconds = 50.0
        progress.answered(missing[0], 5100)
    # 25,000 tokens in all, of the first hundred answers 15,000.
    assert capsys.readouterr().out == (
        "estimate: 100 answers took 50 s (500 tokens/s, 150 tokens per answer); the "
        "other 300 will take about 90 s, and all about 2 MB of disk\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_a_tokenizer_without_a_template_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny_llama(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    assert run(target=tmp_path / "base") == 1
    assert "no chat template (a base model?)" in capsys.readouterr().err
    assert run("--no-chat-template", target=tmp_path / "base") == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"target": "/nonexistent/target"}, ["--target '/nonexistent/target'"]),
        ({"prompts": "nothing.jsonl"}, ["nothing.jsonl: no such file"]),
        ({"prompts": "a question? " * 30}, ["cannot be read", "name too long"]),
        ({"prompts": "~nobody-here/x"}, ["cannot be read", "home directory"]),
        ({"prompts_top_p": 0.5}, ["--prompts-top-p: got 0.5", "self:... reads it"]),
        ({"prompts_column": "x"}, ["--prompts-column: got x", "hf:... reads it"]),
        ({"max_num_seqs": 0}, ["--max-num-seqs: got 0"]),
        ({"held_out": 1.0}, ["--held-out: got 1.0", "less than 1"]),
        ({"top_p": 0.0, "seed": 1}, ["--top-p: got 0.0", "greater than 0"]),
        ({"temperature": "nan"}, ["--temperature: got nan"]),
        ({"limit": -1}, ["--limit: got -1"]),
        ({"max_tokens": 600}, ["context of 664", "own limit is 512; lower"]),
        ({"max_model_len": 64}, ["--max-model-len: got 64, expected 96 to 512"]),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    run: Run,
    engine: type[FakeEngine],
    flags: dict[str, object],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(**flags) == 1
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert error.count("--max-num-seqs") <= 1
    assert not engine.calls
    assert not (tmp_path / "out").exists()


def test_a_target_without_a_tokenizer(
    run: Run, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(target=tiny_llama) == 1
    assert "its tokenizer cannot be loaded" in capsys.readouterr().err


def test_the_package_is_missed_first(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vllm_mtp.cli.generate.find_spec", lambda _: None)
    assert run(target="/nonexistent") == 1
    assert "pip install 'vllm-mtp[train]'" in capsys.readouterr().err


def test_a_foreign_folder_is_left_alone(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert run(out=tmp_path / "mine") == 1
    assert "name another" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ["--no-chat-template", "A run that was stopped", "hf:NAME_OR_PATH"]:
        assert words in text


@pytest.mark.parametrize("flag", ["prompts", "out", "target"])
def test_names_that_cannot_be_written_are_refused(
    run: Run, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(**{flag: f"{tmp_path}/\udcff.jsonl"}) == 1
    error = capsys.readouterr().err
    assert "\\udcff.jsonl': not UTF-8" in error
    assert error.count("\n") == 1
