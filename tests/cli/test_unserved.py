# SPDX-License-Identifier: Apache-2.0
"""Drafters that vLLM cannot run: every command says so, or refuses before its work."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from vllm_mtp.cli.main import main
from vllm_mtp.drafter.checkpoint import read_config
from vllm_mtp.drafter.config import DrafterConfig, OwnLayerConfig

# By the key for which vLLM refuses them: flags of `init` and `train`.
UNSERVED = {
    "extra_rows": ["--layers", "shared:0", "--extra-rows", "2"],
    "boundary_of": [
        *("--layers", "own:0", "--boundary-hidden", "all"),
        *("--boundary-of", "bound"),
    ],
    "boundary_layers": [
        *("--layers", "own:0", "--boundary-hidden", "all"),
        *("--boundary-layers", "1", "0"),
    ],
}


@pytest.fixture(params=UNSERVED)
def key(request: pytest.FixtureRequest) -> str:
    return request.param


def make(target: Path, folder: Path, flags: list[str]) -> Path:
    flags = ["--target", str(target), "--num-speculative-tokens", "2", *flags]
    assert main(["init", *flags, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(key: str, tiny_llama: Path, tmp_path: Path) -> Path:
    return make(tiny_llama, tmp_path / "drafter", UNSERVED[key])


def test_these_are_all_kinds(tmp_path: Path, tiny_llama: Path) -> None:
    found = set()
    for name, flags in UNSERVED.items():
        found |= set(read_config(make(tiny_llama, tmp_path / name, flags)).unserved)
    marked = {
        name
        for model in (DrafterConfig, OwnLayerConfig)
        for name, info in model.model_fields.items()
        if "not served yet" in (info.description or "").lower()
    }
    assert found == marked == set(UNSERVED)


def require_said(out: str, key: str) -> None:
    assert key in out
    assert "vLLM" in out
    for offer in (
        *("vllm serve", "vllm-mtp check", "vllm-mtp bench"),
        *("--in-vllm", "speculative_config"),
    ):
        assert offer not in out, offer


def test_what_is_printed_offers_no_serving(
    key: str,
    folder: Path,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(tiny_llama, tmp_path / "another", UNSERVED[key])
    require_said(capsys.readouterr().out, key)
    require_said((folder / "README.md").read_text("utf-8"), key)
    for command in (
        ["inspect", str(folder)],
        ["push", str(folder), "--repo-id", "jane/d", "--dry-run"],
    ):
        assert main(command) == 0
        require_said(capsys.readouterr().out, key)

    def trained(args: Any, target: Path) -> dict[str, float]:
        shutil.copytree(folder, str(args.output_dir), dirs_exist_ok=True)
        return {"eval_teacher_forced_length": 1.0}

    monkeypatch.setattr("vllm_mtp.training.run.train", trained)
    settings = ["--target", str(tiny_llama), "--num-speculative-tokens", "2"]
    settings += [*UNSERVED[key], "--data", "answers", "--report-to", "none"]
    settings += ["--output-dir", str(tmp_path / "trained")]
    assert main(["train", *settings]) == 0
    out = capsys.readouterr().out
    require_said(out, key)
    assert "vllm-mtp eval" in out
    main(["plan", *settings[:-6], "--trace"])
    require_said(capsys.readouterr().out, key)


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "DRAFTER", "--target", "TARGET", "--data", "none", "--in-vllm"],
        [
            *("eval", "SERVED", "--target", "TARGET", "--data", "none", "--in-vllm"),
            *("--baseline", "DRAFTER"),
        ],
        ["check", "DRAFTER", "--target", "TARGET"],
        ["bench", "--drafters", "DRAFTER", "--target", "TARGET"],
        ["demo", "--drafter", "DRAFTER", "--target", "TARGET"],
    ],
    ids=lambda command: f"{command[0]}-{len(command)}",
)
def test_what_runs_vllm_refuses_it_first(
    command: list[str],
    key: str,
    folder: Path,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = make(tiny_llama, tmp_path / "served", ["--layers", "shared:0"])
    assert "vllm serve" in capsys.readouterr().out
    for work in ("torch_host.load.load_frozen", "data.demo_target.ensure_demo_target"):
        monkeypatch.setattr(f"vllm_mtp.{work}", None)
    names = {"DRAFTER": folder, "SERVED": served, "TARGET": tiny_llama}
    monkeypatch.chdir(tmp_path)
    assert main([str(names.get(word, word)) for word in command]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{folder}: {key}: got " in line
    assert "vllm-mtp eval" in line
