# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp generate --prompts self:N``: prompts that the target writes itself."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.data.conftest import (
    ASSISTANT,
    BEGIN,
    END,
    TEMPLATE,
    USER,
    generate_command,
    make_tokenizer,
)
from tests.data.test_resume import one_thread
from tests.tiny_targets import VOCAB_SIZE, make_tiny_llama
from vllm_mtp.cli.main import main
from vllm_mtp.data.generation import Answer
from vllm_mtp.data.odd_rows import OddRows
from vllm_mtp.data.render import Request
from vllm_mtp.data.settings import (
    EngineSettings,
    MachineSettings,
    SamplingSettings,
    SourceSettings,
    WritingSettings,
)
from vllm_mtp.data.shard import Shard
from vllm_mtp.data.store import SPLITS, read_provenance, read_split
from vllm_mtp.data.user_turn import UserTurn
from vllm_mtp.data.written import (
    WRITTEN_FILE,
    Written,
    WrittenFile,
    numbers_of,
    prompts_of,
)
from vllm_mtp.errors import DataError

pytest.importorskip("datasets")

GOOD = [f"What can one see in town number {n}?" for n in range(30)]


def usable(*texts: str, ended: bool = True) -> tuple[list[str], dict[str, int]]:
    written = {
        n: Written(number=n, text=text, ended=ended) for n, text in enumerate(texts)
    }
    turn = UserTurn("<|user|>", frozenset({"### Response:"}))
    odd = OddRows(strict=True)  # which ends no run here
    found = prompts_of(written, list(written), "self:9", turn, ["<|end|>"], odd)
    return [prompt.messages[0]["content"] for prompt in found], odd.counts


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Too short, too short"[:19], "written, too short"),
        ("  " + "x" * 19 + "\n" * 9, "written, too short"),
        ("ab cd " * 400, "written, too many characters"),
        ("What is it?<|end|> And why is it so?", "written, a special token or a role"),
        (
            "What is here?\n### Response:\nIt is",
            "written, a special token or a role",
        ),
        ("the same again and " * 9, "written, repeats itself"),
        ("ha" * 40, "written, repeats itself"),
        ("一二三四五六七" * 9, "written, repeats itself"),
        ("What is this, \N{REPLACEMENT CHARACTER}, here?", "half of a character"),
    ],
)
def test_what_is_no_prompt_is_counted(text: str, reason: str) -> None:
    assert usable(GOOD[0], text, GOOD[1]) == (GOOD[:2], {reason: 1})


def test_what_people_write_is_a_prompt() -> None:
    texts = [
        *GOOD[:3],
        "x" * 7 + " and thirteen",  # twenty characters
        "Sort these numbers: 17, 3, 44, 8, 25, 1, 90, 12, 33, 70, 51, 29, 66, 4",
        "def f(a, b):\n    return a + b\n\nWhat does f(2, 3) give, and what f(3, 2)?",
        "请用三句话介绍一下这座城市的历史，以及它最有名的建筑。",
    ]
    assert usable(*texts) == (texts, {})
    assert usable(f"  {GOOD[0]}\n") == (GOOD[:1], {})
    assert usable(GOOD[0], ended=False) == ([], {"written, did not end": 1})


def test_shards_have_each_number_once() -> None:
    def numbers(**fields: Any) -> tuple[list[int], int]:
        return numbers_of(SourceSettings(prompts="self:20", **fields))

    assert numbers() == (list(range(20)), 0)
    assert numbers(skip=3, limit=4) == ([3, 4, 5, 6], 0)
    assert numbers(skip=18, limit=4) == ([18, 19], 0)
    for fields in ({}, {"skip": 5}, {"skip": 1, "limit": 11}):
        parts = [numbers(shard=f"{n}/3", **fields) for n in (1, 2, 3)]
        whole, _ = numbers(**fields)
        assert sorted(number for own, _ in parts for number in own) == whole
        assert all(len(own) + others == len(whole) for own, others in parts)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    file = WrittenFile(tmp_path)
    assert file.read() == {}
    one = Written(number=3, text="a\u2028b\n", ended=True)
    file.write([one])
    file.add([one.model_copy(update={"number": 1})])
    assert [json.loads(line)["number"] for line in file.path.open()] == [3, 1]
    assert file.read()[3] == one
    with file.path.open("a") as cut:
        cut.write('{"number": 2, "te')
    assert set(file.read()) == {1, 3}, "what a kill has cut is written again"
    for line in ("{", '{"number": 1}', '{"number": -1, "text": "", "ended": true}'):
        file.path.write_text(f"{one.model_dump_json()}\n{line}\n")
        with pytest.raises(DataError, match=r"written\.jsonl, line 2: .* another"):
            file.read()


class FakeEngine:
    """Writes what it is told to, and answers with the prompt."""

    started = 0
    texts: ClassVar[list[str]] = []
    asked: ClassVar[list[Request]] = []
    most = 999  # prompts to write until it is interrupted

    def __init__(
        self,
        target: Path,
        settings: EngineSettings,
        sampling: SamplingSettings,
        machine: MachineSettings,
    ) -> None:
        type(self).started += 1
        self._tokenizer = make_tokenizer()

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def answers(
        self, requests: Iterable[Request], sampling: SamplingSettings | None = None
    ) -> Iterator[tuple[Request, Answer]]:
        for request in requests:
            if sampling is None:
                yield request, Answer(request.token_ids, "length")
                continue
            if len(self.asked) == self.most:
                raise KeyboardInterrupt
            self.asked.append(request)
            assert self._tokenizer.decode(request.token_ids) == BEGIN + USER
            assert sampling == SamplingSettings(temperature=0.9, max_tokens=40, seed=5)
            text = self.texts[int(request.prompt_id.removeprefix("self:"))]
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) >= sampling.max_tokens:
                yield request, Answer(ids[: sampling.max_tokens], "length")
            else:
                yield request, Answer([*ids, self._tokenizer.eos_token_id], "stop")


Run = Callable[..., int]


@pytest.fixture
def run(chat_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command with the fake engine, twelve prompts unless told otherwise."""
    monkeypatch.setattr(FakeEngine, "started", 0)
    monkeypatch.setattr(FakeEngine, "most", 999)
    monkeypatch.setattr(FakeEngine, "texts", GOOD)
    monkeypatch.setattr(FakeEngine, "asked", [])
    monkeypatch.setattr("vllm_mtp.data.answerer.answering", FakeEngine)
    monkeypatch.setattr("vllm_mtp.engine.vllm_version", lambda: "1.2")
    defaults: dict[str, object] = {
        "target": chat_target,
        "prompts": "self:12",
        "prompts_temperature": 0.9,
        "prompts_max_tokens": 40,
        "seed": 5,
        "out": tmp_path / "out",
        "max_prompt_tokens": 64,
        "max_tokens": 32,
        "max_num_seqs": 4,
        "held_out": 0.4,
    }

    def run(*switches: str, **changes: object) -> int:
        return main(generate_command(*switches, **(defaults | changes)))

    return run


def text_of(row: dict[str, Any], tokenizer: Any) -> str:
    """A row's prompt, out of its template."""
    text = tokenizer.decode(row["input_ids"][: row["loss_spans"][0][0]])
    for special in (BEGIN, USER, END, ASSISTANT):
        assert text.count(special) == 1
        text = text.replace(special, "")
    return text.strip()


def prompts(folder: Path, tokenizer: Any = None) -> dict[str, list[str]]:
    """The texts of each split."""
    tokenizer = tokenizer or make_tokenizer()
    counts = read_provenance(folder).splits
    found: dict[str, list[str]] = {}
    for split in SPLITS:
        rows = list(read_split(folder, split)) if counts[split].rows else []
        found[split] = [text_of(row, tokenizer) for row in rows]
        assert {row["category"] for row in rows} <= {"self"}
        assert all(row["split_id"] == row["prompt_id"] for row in rows)
    return found


def test_prompts_are_written_and_answered_by_one_engine(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeEngine.texts = [
        *GOOD[:8],
        GOOD[0],
        "Short.",
        "x y z " * 20,
        "Why?" + END + "!" * 20,
    ]
    assert run() == 0
    assert FakeEngine.started == 1
    found = prompts(tmp_path / "out")
    assert sorted(found["train"] + found["held_out"]) == sorted(GOOD[:8])
    assert min(map(len, found.values())) > 0
    provenance = read_provenance(tmp_path / "out")
    assert provenance.settings.source.writing == WritingSettings(
        temperature=0.9, max_tokens=40, seed=5
    )
    counts = provenance.prompts
    assert (counts.read, counts.kept, counts.duplicates_dropped) == (12, 8, 1)
    assert counts.odd_skipped == {
        "written, too short": 1,
        "written, did not end": 1,
        "written, a special token or a role": 1,
    }
    out = capsys.readouterr().out
    assert f"12 prompts, 12 of them to be written by the target behind:\n{BEGIN}" in out
    assert "written prompts left out:\n" in out
    assert "1 x written, too short (first: self:12, prompt 9: got 'Short.'" in out
    assert run() == 0
    assert "finished already" in capsys.readouterr().out


def test_a_stopped_run_goes_on_with_the_same_prompts(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(out=tmp_path / "whole") == 0
    FakeEngine.asked.clear()
    FakeEngine.most = 6
    assert run() == 130
    lines = (tmp_path / "out" / WRITTEN_FILE).read_text().splitlines()
    assert len(lines) == 6
    FakeEngine.asked.clear()
    FakeEngine.most = 3
    capsys.readouterr()
    assert run(seed=6) == 1
    assert "source.writing.seed: the folder has 5" in capsys.readouterr().err
    assert run() == 130
    FakeEngine.most = 999
    FakeEngine.asked.clear()
    # What was written is kept, whatever the target would write now.
    FakeEngine.texts = [text.replace("What", "Where") for text in GOOD]
    assert run() == 0
    assert [request.category for request in FakeEngine.asked] == ["9", "10", "11"]
    changed = FakeEngine.texts[9:12]
    found = prompts(tmp_path / "out")
    assert sorted(sum(found.values(), [])) == sorted([*GOOD[:9], *changed])


def test_prompts_that_were_changed_between_are_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    (tmp_path / "out" / "generation.json").unlink()
    file = WrittenFile(tmp_path / "out")
    written = file.read()
    written[3] = written[3].model_copy(update={"text": "Another question than this?"})
    file.write(written.values())
    assert run() == 1
    assert "the source's contents changed" in capsys.readouterr().err


def test_shards_write_and_answer_all_prompts_once(run: Run, tmp_path: Path) -> None:
    assert run(out=tmp_path / "whole") == 0
    both: list[str] = []
    for number in (1, 2):
        out = tmp_path / str(number)
        FakeEngine.asked.clear()
        assert run(out=out, shard=f"{number}/2") == 0
        numbers = [int(request.category) for request in FakeEngine.asked]
        assert numbers == [n for n in range(12) if Shard(number, 2).holds(n)]
        assert read_provenance(out).prompts.in_other_shards == 6
        assert read_provenance(out).prompts.kept == 6
        both += sum(prompts(out).values(), [])
    assert sorted(both) == sorted(sum(prompts(tmp_path / "whole").values(), []))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"prompts": "self:0"}, "--prompts self:0: expected self:N"),
        ({"prompts_temperature": 0}, "--prompts-temperature: got 0"),
        ({"prompts_top_p": 1.5}, "--prompts-top-p: got 1.5"),
        ({"prompts_max_tokens": 0}, "--prompts-max-tokens: got 0"),
        ({"prompts_max_tokens": 95}, "--prompts-max-tokens: got 95, behind 2 tokens"),
        ({"no_chat_template": None}, "--no-chat-template: with --prompts self:N"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    flags: dict[str, Any],
    words: str,
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    switches = ["--no-chat-template"] if "no_chat_template" in flags else []
    given = {name: value for name, value in flags.items() if value is not None}
    assert run(*switches, **given) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not FakeEngine.started
    assert not (tmp_path / "out").exists()


def test_nothing_usable_is_one_line(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeEngine.texts = ["Short."] * 12
    assert run() == 1
    error = capsys.readouterr().err
    assert "nothing to answer: 12 rows read; 12 x written, too short" in error


@pytest.fixture(scope="module")
def word_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target with a word per token, so that what it samples is a text."""
    special = [BEGIN, END, USER, ASSISTANT]
    vocab = {text: number for number, text in enumerate(special)}
    vocab |= {f"w{number}": number for number in range(len(special), VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="w9"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END
    )
    made.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("targets") / "words"
    make_tiny_llama(folder, eos_token_id=[1, *range(400, 430)])
    made.save_pretrained(folder)
    return folder


@pytest.mark.engine
@pytest.mark.usefixtures(one_thread.__name__)
def test_the_same_command_writes_the_same_prompts(
    word_target: Path, tmp_path: Path
) -> None:
    """Whatever else is computed with them."""
    pytest.importorskip("vllm")

    def run(out: str, **flags: object) -> dict[int, Written]:
        given: dict[str, object] = {
            "target": word_target,
            "prompts": "self:60",
            "prompts_max_tokens": 40,
            "out": tmp_path / out,
            "dtype": "float32",
            "max_prompt_tokens": 64,
            "max_tokens": 8,
            "held_out": 0.3,
        }
        assert main(generate_command(**(given | flags))) == 0
        return WrittenFile(tmp_path / out).read()

    whole = run("whole", max_num_seqs=16)
    assert sorted(whole) == list(range(60))
    assert len({one.text for one in whole.values()}) > 40
    assert {one.ended for one in whole.values()} == {True, False}
    counts = read_provenance(tmp_path / "whole").prompts
    assert (counts.read, counts.kept > 20) == (60, True)
    assert counts.odd_skipped["written, did not end"] > 0
    tokenizer = PreTrainedTokenizerFast.from_pretrained(word_target)
    found = sum(prompts(tmp_path / "whole", tokenizer).values(), [])
    texts = {one.text.strip() for one in whole.values()}
    assert set(found) <= texts
    part = run("part", shard="2/3", max_num_seqs=3)
    assert part == {number: whole[number] for number in range(1, 60, 3)}
