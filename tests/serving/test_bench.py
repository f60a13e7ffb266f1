# SPDX-License-Identifier: Apache-2.0
"""`vllm-mtp bench` with servers: ``pytest -m slow tests/serving/test_bench.py``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_targets import make_tiny
from tests.tiny_tokenizer import save_tiny_tokenizer
from vllm_mtp.cli.main import main

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_a_whole_benchmark(
    tmp_path: Path, tiny_drafter: Callable[[str, str], Path]
) -> None:
    target = make_tiny("llama", tmp_path / "llama")
    save_tiny_tokenizer(target)
    prompts = tmp_path / "prompts.jsonl"
    texts = {"one two": "few", "three": "few", "four": "many", "five": "many"}
    lines = [json.dumps({"prompt": t, "category": c}) for t, c in texts.items()]
    prompts.write_text("\n".join(lines) + "\n")
    drafter = tiny_drafter("llama", "shared-4")
    out = tmp_path / "out"
    arguments = ["--target", target, "--drafters", drafter, "--prompts", prompts]
    settings = "--baselines ngram --concurrency 1 2 --num-speculative-tokens 1 2 "
    settings += "--rounds 1 --num-prompts 2 --max-tokens 24 --max-model-len 256 "
    settings += "--dtype float32 --enforce-eager --contexts 60 --profile"
    settings += f" --categories {prompts} --calibrate {drafter.name}"
    command = [*map(str, arguments), *settings.split(), "--out", str(out)]
    assert main(["bench", *command]) == 0
    report = json.loads((out / "benchmark.json").read_text())
    first, calibrated = report["stages"]
    kinds = [load["varies"] for load in first["plan"]["loads"]]
    assert kinds == ["concurrency"] * 2 + ["context"] + ["category"] * 2
    sides = [line["side"] for line in first["lines"][: len(first["plan"]["sides"])]]
    name = drafter.name
    ours = [f"{name} k=1", f"{name} k=2", f"{name} auto"]
    assert sides == ["none", "ngram k=2", *ours, "none again"]
    assert len(set(first["kv_blocks"].values())) == 1
    for line in first["lines"]:
        assert line["tokens_per_s"]["median"] > 0
        assert line["same_texts"] == line["texts"]
        assert line["texts"] == (4 if line["load"] == "2 at once" else 2)
        assert line["verdict"] is None, "of one round there is none"
        counts = line["counts"]
        if line["side"] in ours[:2]:
            # The whole target drafts: its first draft is right.
            assert counts["accepted_per_position"][0] > 0.8 * counts["drafts"] > 0
        if line["side"] == ours[0]:  # on a server for two, but asked for one
            assert counts["draft_tokens"] == counts["drafts"]
        if line["side"] == ours[1]:
            assert counts["draft_tokens"] > counts["drafts"]
        if line["side"] == "none again":
            assert counts["drafts"] == 0
    sides = [side["name"] for side in calibrated["plan"]["sides"]]
    assert sides == ["none", f"{name} calibrated", "none again"]
    (schedule,) = report["schedules"].values()
    assert schedule[0][0] == 1
    assert schedule[-1][1] == 2
    check_profiles(report["profiles"], name)
    text = (out / "benchmark.md").read_text()
    assert text.count("| Load | Side |") == 6, "a table per kind of load and stage"
    assert "| 60 tokens before | none |" in text
    assert "| ms per step | none, 1 at once | none, 2 at once |" in text


def check_profiles(profiles: list[dict[str, Any]], drafter: str) -> None:
    """Each side's parts add up to its step, and only drafters draft."""
    assert [profile["batch"] for profile in profiles] == [1, 2, 1, 2]
    for profile in profiles:
        parts = profile["parts"]
        assert 0.95 < sum(parts.values()) / profile["ms"] < 1.001
        assert all(time > 0 for time in parts.values())
        drafts = any(name.startswith("draft: ") for name in parts)
        assert drafts == profile["side"].startswith(drafter)
