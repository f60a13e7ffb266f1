# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp eval`` from the command line to its files."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM

from tests.tiny_targets import make_tiny_llama
from vllm_mtp.cli.main import main
from vllm_mtp.data.settings import (
    EngineSettings,
    PromptCounts,
    RunFile,
    RunSettings,
    SamplingSettings,
    SourceSettings,
)
from vllm_mtp.data.store import Store
from vllm_mtp.drafter.checkpoint import save_drafter
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.evaluation.offline import OfflineResult
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter

ANSWER_TOKENS = 8


@torch.no_grad()
def greedy(target: Path, prompt: list[int], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


def make_data(
    target: Path,
    folder: Path,
    answer_tokens: int = ANSWER_TOKENS,
    held_out: float = 0.5,
    temperature: float = 0.0,
    policy: Literal["on-policy", "off-policy"] = "on-policy",
    categories: tuple[str, str] = ("code", "chat"),
) -> Path:
    """A folder as ``vllm-mtp generate`` writes it: 4 answers held out, 1 to train."""
    rows = []
    for i, prompt in enumerate([[1, 2, 3], [4], [5, 6], [7, 8, 9], [10, 11]]):
        tokens = greedy(target, prompt, answer_tokens)
        rows.append(
            {
                "prompt_id": f"{'f' if i == 4 else i}" * 32,
                "category": categories[i % 2],
                "input_ids": tokens,
                "loss_spans": [[len(prompt), len(tokens)]],
                "finish_reason": "length",
            }
        )
    settings = RunSettings(
        target=TargetFacts.from_folder(target),
        source=SourceSettings(prompts="made.jsonl"),
        sampling=SamplingSettings(max_tokens=answer_tokens, temperature=temperature),
        engine=EngineSettings(max_model_len=64),
        chat_template=False,
        max_prompt_tokens=8,
        held_out=held_out,
        vllm="none",
        policy=policy,
    )
    store, run = Store(folder), RunFile(settings=settings, prompts_sha256="0" * 64)
    store.start(run)
    store.write_part(rows)  # type: ignore[arg-type]
    counts = PromptCounts(read=5, duplicates_dropped=0, too_long_dropped=0)
    store.finish([str(row["prompt_id"]) for row in rows], run, counts, {})
    return folder


def make_drafter(target: Path, folder: Path, k: int) -> Path:
    options = DrafterOptions(dtype="float32")
    return save_drafter(new_drafter(target, "shared:all", k, options), folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """``data`` and a drafter for 2 tokens, in one folder."""
    folder = tmp_path_factory.mktemp("eval")
    make_data(tiny_llama, folder / "data")
    make_drafter(tiny_llama, folder / "drafter", 2)
    return folder


@pytest.fixture
def run(root: Path, tiny_llama: Path) -> Callable[..., int]:
    """Run the command; flags given later win."""

    def _run(*flags: str, target: Path = tiny_llama, data: Path | None = None) -> int:
        data = data or root / "data"
        arguments = ["--target", str(target), "--data", str(data), "--device", "cpu"]
        return main(["eval", str(root / "drafter"), *arguments, *flags])

    return _run


def test_several_folders_give_a_row_for_each_kind(
    run: Callable[..., int],
    root: Path,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = make_data(tiny_llama, tmp_path / "b", categories=("later", "code"))
    both = [str(root / "data"), str(other)]
    assert run("--data", *both, "--out", str(tmp_path / "out")) == 0
    result = OfflineResult.from_json((tmp_path / "out/evaluation.json").read_bytes())
    assert {name: row.sequences for name, row in result.by_category.items()} == {
        "chat": 2,
        "code": 4,
        "later": 2,
    }
    assert result.settings["data"] == ["data", "b"]
    said = capsys.readouterr().out
    assert all(f"\n| {name} " in said for name in ("chat", "code", "later"))
    warm = make_data(tiny_llama, tmp_path / "warm", temperature=0.7)
    capsys.readouterr()
    assert run("--data", both[0], str(warm)) == 1
    error = capsys.readouterr().err
    assert f"--data {warm}: its answers were made with" in error
    assert "temperature 0.7" in error
    assert error.count("\n") == 1


def test_end_to_end(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--out", str(tmp_path / "out")) == 0
    result = OfflineResult.from_json((tmp_path / "out/evaluation.json").read_bytes())
    assert result.k == 2
    assert {n: c.sequences for n, c in result.by_category.items()} == {
        "chat": 2,
        "code": 2,
    }
    total = result.total
    assert total.tokens == 4 * ANSWER_TOKENS
    assert total.teacher_forced.drafts == 4 * (ANSWER_TOKENS - 1)
    # The whole target, in float32: the first draft is the target's own token.
    assert total.teacher_forced.acceptance_per_position[0] == 1.0
    assert total.simulated.acceptance_per_position[0] == 1.0
    assert result.settings["split"] == "held_out"
    assert result.settings["answers_temperature"] == 0.0
    out = capsys.readouterr().out
    assert (tmp_path / "out/evaluation.md").read_text().strip() in out
    assert str(tmp_path / "out/acceptance.png") in out


def test_flags_choose_what_is_evaluated(
    run: Callable[..., int], tmp_path: Path
) -> None:
    def result(*flags: str) -> OfflineResult:
        assert run(*flags, "--out", str(tmp_path)) == 0
        return OfflineResult.from_json((tmp_path / "evaluation.json").read_bytes())

    assert result("--limit", "3").total.sequences == 3
    assert result("--limit", "99").total.sequences == 4
    assert result("--split", "train").total.sequences == 1
    one = result("--num-speculative-tokens", "1")
    assert (one.k, len(one.total.simulated_by_k)) == (1, 1)
    assert result("--dtype", "bfloat16").settings["dtype"] == "bfloat16"


def test_without_out_nothing_is_written(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    # Nor is matplotlib needed.
    monkeypatch.setattr("vllm_mtp.evaluation.report.find_spec", lambda _: None)
    assert run() == 0
    assert "**all**" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--num-speculative-tokens", "3"], "got 3, expected 1 to 2"),
        (["--num-speculative-tokens", "0"], "got 0, expected 1 to 2"),
        (["--split", "test"], "no split 'test'"),
        (["--limit", "0"], "--limit: got 0"),
        (["--device", "warp"], "--device: got 'warp'"),
        (["--data", "/nonexistent"], "/nonexistent"),
        (["--drafter", "/nonexistent"], "/nonexistent/config.json"),
    ],
)
def test_says_what_is_wrong(
    flags: list[str],
    text: str,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*flags) == 1
    assert text in capsys.readouterr().err


def test_refuses_another_targets_answers(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_tiny_llama(tmp_path / "other", intermediate_size=80)
    data = make_data(other, tmp_path / "data")
    assert run(data=data) == 1
    assert "the answers are those of the target 'other'" in capsys.readouterr().err


def test_refuses_a_drafter_of_another_target(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_tiny_llama(tmp_path / "other", intermediate_size=80)
    assert run(target=other) == 1
    assert "this drafter does not fit the target" in capsys.readouterr().err


def test_refuses_data_without_anything_to_draft(
    run: Callable[..., int],
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = make_data(tiny_llama, tmp_path / "short", answer_tokens=1)
    assert run(data=data) == 1
    assert "none of the 4 sequences" in capsys.readouterr().err
    data = make_data(tiny_llama, tmp_path / "empty", held_out=0.0)
    assert run(data=data) == 1
    assert "'held_out' has no rows" in capsys.readouterr().err


def test_sampled_answers_are_said(
    run: Callable[..., int],
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run() == 0
    assert "sampled" not in capsys.readouterr().out
    assert run(data=make_data(tiny_llama, tmp_path / "data", temperature=0.7)) == 0
    assert "sampled at temperature 0.7" in capsys.readouterr().out


def test_answers_that_the_target_did_not_write_are_said(
    run: Callable[..., int],
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run() == 0
    assert "off-policy" not in capsys.readouterr().out
    data = make_data(tiny_llama, tmp_path / "data", policy="off-policy")
    assert run("--out", str(tmp_path / "out"), data=data) == 0
    said = "The target did not write these answers (off-policy)"
    assert said in capsys.readouterr().out
    assert '"answers_policy": "off-policy"' in (
        tmp_path / "out" / "evaluation.json"
    ).read_text("utf-8")


def test_missing_matplotlib_is_said_before_the_work(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm_mtp.evaluation.report.find_spec", lambda _: None)
    assert run("--out", str(tmp_path / "out")) == 1
    output = capsys.readouterr()
    assert "vllm-mtp[bench]" in output.err
    assert output.out == ""
