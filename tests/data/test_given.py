# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp generate --answers given``: text that is there already."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import (
    ASSISTANT,
    BEGIN,
    END,
    USER,
    WriteJsonl,
    WriteShareGPT,
    make_tokenizer,
)
from tests.data.test_generate import rows
from tests.tiny_answers import MakeArguments, training_log
from vllm_mtp.cli.main import main
from vllm_mtp.data.prompts import read_prompts
from vllm_mtp.data.settings import SourceSettings
from vllm_mtp.data.split import id_of_text, is_held_out
from vllm_mtp.data.store import HELD_OUT, TRAIN, read_provenance, read_split
from vllm_mtp.engine import FrontEnd, front_end
from vllm_mtp.sharing.provenance import read_provenance as read_record
from vllm_mtp.training.run import train

datasets = pytest.importorskip("datasets")
pytest.importorskip("vllm")

Run = Callable[..., int]


def asked(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str | None, **more: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def text_of(row: dict[str, Any]) -> tuple[str, str]:
    """The prompt and what is trained on, as text."""
    ((start, end),) = row["loss_spans"]
    assert end == len(row["input_ids"])
    decode = make_tokenizer().decode
    return decode(row["input_ids"][:start]), decode(row["input_ids"][start:])


@pytest.fixture
def run(
    thinking_target: Path,
    write_jsonl: WriteJsonl,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """The command on conversations; an engine must not be started."""

    def start(*_: object, **__: object) -> None:
        raise AssertionError("no engine is needed")

    monkeypatch.setattr("vllm_mtp.engine.start", start)

    def run(turns: list[list[Any]], *more: str, **changes: object) -> int:
        prompts = write_jsonl([{"messages": each} for each in turns])
        flags: dict[str, object] = {
            "target": thinking_target,
            "prompts": prompts,
            "out": tmp_path / "out",
            "answers": "given",
            "max-prompt-tokens": 64,
            "max-tokens": 32,
            "held-out": 0.3,
        }
        flags |= {name.replace("_", "-"): value for name, value in changes.items()}
        return main(
            [
                "generate",
                *sum([[f"--{k}", str(v)] for k, v in flags.items()], []),
                *more,
            ]
        )

    return run


def test_the_answer_stands_behind_what_the_endpoint_gives_the_target(
    run: Run, thinking_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [
        [asked("a"), said("b", reasoning="mm")],
        [asked("a"), said("b", reasoning="hm"), asked("é"), said("d")],
    ]
    assert run(turns) == 0
    found = {text_of(row) for row in rows(tmp_path / "out")}
    # Up to the token that ends it: the template's end of line is nobody's answer. And
    # an earlier turn is without the thinking that the target wrote there.
    long = f"{BEGIN}{USER}a{END}\n{ASSISTANT}b{END}\n{USER}é{END}\n{ASSISTANT}"
    assert found == {
        (f"{BEGIN}{USER}a{END}\n{ASSISTANT}", f"<think>mm</think>b{END}"),
        (long, f"<think></think>d{END}"),
    }
    chat = front_end(thinking_target)
    tokenize = make_tokenizer()
    for row in rows(tmp_path / "out"):
        ((start, _),) = row["loss_spans"]
        assert row["finish_reason"] == "stop"
        prompt = turns[0][:1] if start < 10 else turns[1][:3]
        served = tokenize(chat.render(prompt), add_special_tokens=False)["input_ids"]
        assert row["input_ids"][:start] == served
    settings = read_provenance(tmp_path / "out").settings
    assert settings.policy == "off-policy"
    assert '"policy": "off-policy"' in (tmp_path / "out/generation.json").read_text()
    out = capsys.readouterr().out
    assert f"its answer, 19 tokens:\n<think>mm</think>b{END}" in out
    assert "of them answers" in out
    assert run(turns) == 0
    assert "finished already" in capsys.readouterr().out


def test_arguments_of_the_template_decide_which_answers_fit(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [[asked("a"), said("b", reasoning="mm")], [asked("c"), said("d")]]
    assert run(turns, chat_template_kwargs='{"enable_thinking": false}') == 0
    (row,) = rows(tmp_path / "out")
    prompt = f"{BEGIN}{USER}c{END}\n{ASSISTANT}<think></think>"
    assert text_of(row) == (prompt, f"d{END}")
    counts = read_provenance(tmp_path / "out").prompts
    reason = "the chat template does not write the answer behind its prompt"
    assert counts.odd_skipped == {reason: 1}
    assert (
        f"1 x {reason} (first: {tmp_path}/prompts.jsonl, line 1: the prompt ends "
        in (capsys.readouterr().out)
    )


def test_rows_that_have_no_answer_are_odd(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns: list[list[Any]] = [
        [asked("a")],
        [said("b")],
        [asked("a"), said(" ")],
        [asked("a"), said(None)],
        [asked("a"), said("b"), said("c")],
        ["a"],
        [],
        [asked("x" * 80), said("too long")],
        [asked("a"), said("b")],
        [asked("a"), said("b")],
    ]
    assert run(turns) == 0
    counts = read_provenance(tmp_path / "out").prompts
    assert (counts.read, counts.kept, counts.duplicates_dropped) == (10, 1, 1)
    assert counts.too_long_dropped == 1
    assert counts.odd_skipped == {
        "the last turn is not the assistant's": 3,
        "no turn before the answer": 1,
        "the answer is empty": 1,
        "content is null or missing": 1,
        "the last turn is not the user's or a tool's": 1,
    }
    assert len(rows(tmp_path / "out")) == 1
    assert "with --answers given a row is a list of turns" in capsys.readouterr().out
    assert run(turns[:7], out=tmp_path / "none") == 1
    error = capsys.readouterr().err
    assert "no answer to take: 7 rows read; 3 x the last turn is not" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "none").exists()
    assert run(turns, "--strict", out=tmp_path / "none") == 1
    assert "line 1: the last turn is not the assistant's" in capsys.readouterr().err


def test_every_answer_to_a_prompt_is_kept_and_on_its_side(
    run: Run, tmp_path: Path
) -> None:
    turns = [[asked(str(n % 20)), said(f"{n}")] for n in range(60)]
    assert run(turns, shard="1/2") == 0
    assert run(turns, shard="2/2", out=tmp_path / "other") == 0
    sides: dict[str, set[str]] = {TRAIN: set(), HELD_OUT: set()}
    answers = []
    for folder in ("out", "other"):
        for split, prompts in sides.items():
            for row in read_split(tmp_path / folder, split):
                prompts.add(row["prompt_id"])
                assert is_held_out(row["prompt_id"], 0.3) == (split == HELD_OUT)
                answers.append(text_of(row)[1])
    assert len(sides[TRAIN] | sides[HELD_OUT]) == 20
    wanted = [f"<think></think>{n}{END}" for n in range(60)]
    assert sorted(answers) == sorted(wanted)


def test_long_answers_are_cut_and_an_end_inside_ends(run: Run, tmp_path: Path) -> None:
    turns = [[asked("a"), said("y" * 99)], [asked("b"), said(f"no{END}more")]]
    assert run(turns) == 0
    found = {row["finish_reason"]: row for row in rows(tmp_path / "out")}
    ((start, end),) = found["length"]["loss_spans"]
    assert end - start == 32
    assert text_of(found["stop"])[1] == f"<think></think>no{END}"


def test_a_run_that_was_stopped_begins_anew(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [[asked(f"{n}"), said("b")] for n in range(9)]
    assert run(turns, out=tmp_path / "whole") == 0
    monkeypatch.setattr("vllm_mtp.data.given.PART_ROWS", 4)
    with monkeypatch.context() as patch:
        patch.setattr("vllm_mtp.data.store.Store.finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(turns)
    assert len(list(tmp_path.glob("out/parts/*"))) == 3
    assert run(turns) == 0
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")


def test_a_data_set_as_the_source(run: Run, tmp_path: Path) -> None:
    source = datasets.Dataset.from_dict(
        {"turns": [[asked("a"), said("b")], [asked("c"), said("d")]]}
    )
    source.save_to_disk(str(tmp_path / "source"))
    flags = {"prompts": f"hf:{tmp_path}/source", "prompts_column": "turns"}
    assert run([], **flags) == 0
    assert len(rows(tmp_path / "out")) == 2


def test_the_answers_of_later_turns(
    run: Run, write_sharegpt: WriteShareGPT, tmp_path: Path
) -> None:
    texts = [f"Turn number {number}, which is long." for number in range(5)]
    turns = [("gpt" if n % 2 else "human", text) for n, text in enumerate(texts)]
    write_sharegpt([turns[:4], turns])  # the last turn of the second has no answer
    flags = {"prompts": "sharegpt:later", "max_prompt_tokens": 300, "max_tokens": 200}
    assert run([], **flags) == 0
    (row,) = rows(tmp_path / "out")
    assert row["split_id"] == id_of_text(texts[0])
    prompt, answer = text_of(row)
    assert all(text in prompt for text in texts[:3])
    assert answer == f"<think></think>{texts[3]}{END}"
    skipped = read_provenance(tmp_path / "out").prompts.odd_skipped
    assert skipped == {"the last turn is not the assistant's": 1}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "0.5"], "--temperature: got 0.5, but with --answers given"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size: got 2, but"),
        (["--quantization", "fp8"], "--quantization: got fp8, but"),
        (["--no-chat-template"], "leave one of the two out"),
        (["--prompts", "sharegpt"], "gives prompts only"),
        (["--prompts", "sharegpt:tasks"], "hf:NAME_OR_PATH or sharegpt:later"),
        (["--prompts", "self:3"], "gives prompts only"),
    ],
)
def test_flags_of_an_engine_are_refused(
    flags: list[str], words: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([[asked("a"), said("b")]], *flags) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_folder_of_own_answers_is_not_mixed_with_given_ones(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [[asked("a"), said("b")]]
    assert run(turns) == 0
    path = tmp_path / "out" / "run.json"
    own = path.read_text().replace('"off-policy"', '"on-policy"')
    path.write_text(own)
    assert run(turns) == 1
    assert "policy: the folder has 'on-policy'" in capsys.readouterr().err


def test_tokens_that_would_grow_together_stay_the_prompts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The endpoint gives the target the prompt's own tokens, whatever it answers."""
    render = FrontEnd.render

    def without_special(*of: Any, **how: Any) -> str:
        return str(render(*of, **how)).replace(ASSISTANT, "é"[:1])

    class Merging:
        """A tokenizer that makes one token of "é<"."""

        def __init__(self, own: Any) -> None:
            self._own = own

        def __getattr__(self, name: str) -> Any:
            return getattr(self._own, name)

        def __call__(self, texts: list[str], **how: Any) -> Any:
            merged = [text.replace("é<", "\u00c0") for text in texts]
            return self._own(merged, **how)

    monkeypatch.setattr(FrontEnd, "render", without_special)
    found = FrontEnd.__init__

    def init(self: Any, config: Any) -> None:
        found(self, config)
        self.tokenizer = Merging(self.tokenizer)

    monkeypatch.setattr(FrontEnd, "__init__", init)
    assert run([[asked("a"), said("b")]]) == 0
    (row,) = rows(tmp_path / "out")
    assert text_of(row) == (f"{BEGIN}{USER}a{END}\né", f"<think></think>b{END}")


def test_mistral_commons_conversations_cannot_end(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FrontEnd, "render", lambda *_, **__: [1, 2])
    assert run([[asked("a"), said("b")]]) == 1
    error = capsys.readouterr().err
    assert "renders no conversation that has ended; use --tokenizer-mode hf" in error
    assert error.count("\n") == 1


def test_prompts_with_an_answer_have_the_hash_of_those_without(
    write_jsonl: WriteJsonl,
) -> None:
    """So that a prompt is on one side, whoever answered it."""
    path = write_jsonl([{"messages": [asked("a"), said("b")]}, {"prompt": "a"}])
    given, own = (
        next(read_prompts(SourceSettings(prompts=str(path), skip=skip), answered=read))
        for skip, read in ((0, True), (1, False))
    )
    assert given.identifier == own.identifier
    assert given.answer == said("b")


def test_the_drafter_says_what_it_was_trained_on(
    run: Run,
    arguments: MakeArguments,
    thinking_target: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    turns = [[asked(f"{n}"), said(f"{n} and more")] for n in range(12)]
    assert run(turns) == 0
    args = arguments(
        data=str(tmp_path / "out"),
        target=str(thinking_target),
        output_dir=str(tmp_path / "drafter"),
        layers="own:3",
        max_steps=1,
    )
    with training_log(caplog):
        train(args, thinking_target)
    assert "out: the target did not write these answers (off-policy)" in caplog.text
    assert "were sampled with" not in caplog.text
    card = (tmp_path / "drafter/README.md").read_text()
    off = "text that the target did not write (off-policy)"
    assert f"It was trained on {off}." in card
    assert "`out`: off-policy: answers that the target did not write, from" in card
    assert f"Offline, on {off}" in card
    assert "the target's own answers" not in card
    record = read_record(tmp_path / "drafter")
    assert record is not None
    (data,) = record.every_data
    assert data.generation.settings.policy == "off-policy"
    assert json.loads(data.model_dump_json())["generation"]["settings"]["policy"]
