# SPDX-License-Identifier: Apache-2.0
"""The experiment with drafts that are not verified, on a tiny target."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.tiny_tokenizer import save_tiny_tokenizer
from tools import unverified
from vllm_mtp.drafter.checkpoint import save_drafter
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter

TEMPLATE = "{% for m in messages %}{{ m.content }}:{% endfor %}"


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that can chat, two drafters and five prompts."""
    folder = tmp_path_factory.mktemp("unverified")
    target = shutil.copytree(tiny_llama, folder / "target")
    save_tiny_tokenizer(target)
    (target / "chat_template.jinja").write_text(TEMPLATE)
    for name, layers in (("whole", "shared:all"), ("own", "own:3")):
        made = new_drafter(target, layers, 3, DrafterOptions(dtype="float32"))
        save_drafter(made, folder / name)
    lines = [json.dumps({"prompt": "abcde"[: n + 1]}) for n in range(5)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, **flags: str) -> int:
    given = {
        "target": str(folder / "target"),
        "prompts": str(folder / "prompts.jsonl"),
        "limit": "4",
        "max-tokens": "8",
        "batch": "3",
        "out": str(folder / "out"),
    } | {name.replace("_", "-"): value for name, value in flags.items()}
    drafters = [str(folder / name) for name in ("whole", "own")]
    rules = ["--probability", "0.2", "0", "--entropy", "0"]
    flat = [text for name, value in given.items() for text in (f"--{name}", value)]
    monkeypatch.setattr(
        sys, "argv", ["unverified", *flat, *rules, "--drafter", *drafters]
    )
    return unverified.main()


def test_everything_is_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, monkeypatch) == 0
    out = capsys.readouterr().out
    results = json.loads((folder / "out.json").read_text("utf-8"))
    assert out.strip() == "\n\n".join(
        make(results) for make in (unverified.taken_table, unverified.merged_table)
    )
    assert (folder / "out.png").stat().st_size > 10_000
    assert results["own_tokens"] == 4 * 8
    whole, own = (results["drafters"][str(folder / n)] for n in ("whole", "own"))
    all_of_it = {name: found["unverified"][1] for name, found in
                 (("whole", whole), ("own", own))}  # fmt: skip
    for found in all_of_it.values():
        assert found["tokens_per_forward"] == 4.0  # p of at least 0 takes all drafts
        assert 0 < found["drafts_taken"] < 4 * 8
    # The first draft of the whole target is the target's own, so all that is taken with
    # an entropy of 0 is right.
    sure = whole["unverified"][2]
    assert sure["tokens_per_forward"] == 2.0
    assert sure["drafts_agreed"] == sure["agreed"] == sure["same_answers"] == 1.0
    assert own["unverified"][2]["tokens_per_forward"] == 1.0
    lengths = whole["verified_acceptance_length_by_k"]
    assert lengths[0] == 2.0 <= lengths[1] <= lengths[2]
    assert [row["k"] for row in whole["merged"]] == [2, 3]
    assert "merged" not in own


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"limit": "9"}, "--limit: got 9, expected 1 to 5"),
        ({"prompts": "/nowhere.jsonl"}, "--prompts /nowhere.jsonl: expected a JSONL"),
        ({"out": "/nowhere/out"}, "--out /nowhere/out: its folder is not there"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: dict[str, str],
    reason: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(folder, monkeypatch, **flags) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"unverified: {reason}")
