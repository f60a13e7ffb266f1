# SPDX-License-Identifier: Apache-2.0
"""`vllm-mtp bench`, as far as it goes without servers."""

import json
import shutil
from pathlib import Path

import pytest

from vllm_mtp.bench.loads import CONCURRENCY
from vllm_mtp.bench.run import machine
from vllm_mtp.cli.bench import Bench
from vllm_mtp.cli.main import main
from vllm_mtp.data.demo_target import ensure_demo_target
from vllm_mtp.data.split import is_held_out, prompt_id

# name: (flags, what the message must hold)
WRONG = {
    "no such drafter": (["--drafters", "nobody"], ["--drafters nobody", "cheap"]),
    "calibrate another": (
        ["--drafters", "cheap", "--calibrate", "shared"],
        ["--calibrate shared", "expected one of cheap"],
    ),
    "no such baseline": (["--baselines", "eagle"], ["got eagle", "ngram, draft_model"]),
    "too few prompts": (
        ["--prompts", "PROMPTS", "--concurrency", "4"],
        ["got 1 prompts, expected 8"],
    ),
    "too few unseen prompts": (
        ["--prompts", "sharegpt", "--concurrency", "400"],
        ["sharegpt (not trained on: cheap): got ", "prompts, expected 800"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_refused_before_anything_starts(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Hello"}) + "\n")
    flags, expected = WRONG[name]
    flags = [str(prompts) if flag == "PROMPTS" else flag for flag in flags]
    assert main(["bench", "--target", str(tmp_path), *flags]) == 1
    message = capsys.readouterr().err
    for text in expected:
        assert text in message


def test_the_prompts_are_unseen_and_the_report_says_how(tmp_path: Path) -> None:
    bench = Bench(target=str(tmp_path), drafters=["cheap", "shared"], contexts=[512])
    tokenizer = Path(ensure_demo_target(), "tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer.with_name(name), tmp_path)
    plan = bench._plan(bench._drafters())
    texts = {text for load in plan.loads_of(CONCURRENCY) for text in load.prompts}
    assert len(texts) == 16
    for text in texts:
        # Both were trained with this part held out.
        assert is_held_out(prompt_id([{"role": "user", "content": text}]), 0.04)
    told = machine(plan)["prompts"]
    assert "`cheap`: the 0.04 held out by hash" in told
    assert "`shared`: the 0.04 held out by hash" in told


def test_a_file_of_prompts_is_said_to_be_one(tmp_path: Path) -> None:
    bench = Bench(prompts=str(tmp_path / "mine.jsonl"))
    assert bench._choice_in_words([]).startswith("of mine.jsonl, whatever")
