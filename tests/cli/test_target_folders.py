# SPDX-License-Identifier: Apache-2.0
"""Targets that no command can use: one line, and an exit code."""

from pathlib import Path

import pytest

from vllm_mtp.cli.main import main
from vllm_mtp.drafter.checkpoint import save_drafter
from vllm_mtp.torch_host.new_drafter import new_drafter

CONFIGS = {
    "none": None,
    "broken": '{"model_type": ',
    "a list": "[1]",
    "no type": "{}",
    "an unknown type": '{"model_type": "no-such-model"}',
    "a wrong value": '{"model_type": "llama", "hidden_size": "wide"}',
    "not UTF-8": b'{"model_type": "\xff"}',
}


@pytest.fixture(scope="module")
def drafter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafter") / "own"
    return save_drafter(new_drafter(tiny_llama, "own:3", 2), folder)


@pytest.mark.parametrize("command", ["init", "generate", "train", "eval", "check"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_a_folder_with_such_a_config(
    command: str,
    config: str | bytes | None,
    drafter: Path,
    tiny_answers: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    if config is not None:
        text = config.encode() if isinstance(config, str) else config
        (target / "config.json").write_bytes(text)
    out = str(tmp_path / "out")
    flags = {
        "init": ["--layers", "own:0", "--num_speculative_tokens", "2", "--out", out],
        "generate": ["--prompts", "sharegpt", "--out", out],
        "train": ["--data", str(tiny_answers), "--output_dir", out],
        "eval": ["--drafter", str(drafter), "--data", str(tiny_answers)],
        "check": ["--drafter", str(drafter)],
    }
    assert main([command, "--target", str(target), *flags[command]]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"vllm-mtp {command}: ")
    assert str(target) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "DRAFTER", "--target", "nobody/nothing"],
        ["import", "nobody/nothing", "--target", "TARGET", "--out", "OUT"],
    ],
    ids=["a target", "an adapter"],
)
def test_what_the_hub_says_is_one_line(
    arguments: list[str],
    drafter: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("it is not there.\nCheck your connection.\n")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    places = {"DRAFTER": drafter, "TARGET": tiny_llama, "OUT": tmp_path / "out"}
    assert main([str(places.get(word, word)) for word in arguments]) == 1
    error = capsys.readouterr().err
    assert "OSError: it is not there. Check your connection.)" in error
    assert error.count("\n") == 1
