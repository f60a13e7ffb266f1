# SPDX-License-Identifier: Apache-2.0
"""`vllm-mtp bench`, as far as it goes without servers."""

import json
from pathlib import Path

import pytest

from vllm_mtp.cli.main import main

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
