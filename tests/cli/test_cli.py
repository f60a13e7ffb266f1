# SPDX-License-Identifier: Apache-2.0
"""The command line, run as ``main`` runs it."""

from pathlib import Path

import pytest
from transformers import (
    DeepseekV3Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)

from vllm_mtp.cli.doctor import Finding, examine_target
from vllm_mtp.cli.main import COMMANDS, main
from vllm_mtp.drafter.checkpoint import load_drafter, read_config
from vllm_mtp.drafter.config import OwnLayerConfig, SharedLayerConfig
from vllm_mtp.installed import installed_folder


def init(target: Path, out: Path, *flags: str) -> int:
    return main(["init", "--target", str(target), "--out", str(out), *flags])


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"vllm-mtp {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["fly"], ["init"], ["init", "--wings", "2"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_init_writes_what_was_asked_for(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = init(
        tiny_llama,
        tmp_path / "d",
        "--layers", "shared:0-1,own:3",
        "--num-speculative-tokens", "3",
        "--dtype", "float32",
        "--boundary-hidden", "all",
        "--lora-rank", "2",
        "--lora-modules", "q_proj", "o_proj",
        "--markov-rank", "4",
    )  # fmt: skip
    assert code == 0
    config = load_drafter(tmp_path / "d").config
    assert (config.num_speculative_tokens, config.dtype) == (3, "float32")
    first, second, own = config.layers
    assert isinstance(first, SharedLayerConfig)
    assert first.lora is not None
    assert (first.lora.rank, first.lora.alpha) == (2, 4.0)
    assert first.lora.modules == ("q_proj", "o_proj")
    assert second.target_layer == 1
    assert isinstance(own, OwnLayerConfig)
    assert (own.target_layer, own.boundary_hidden) == (3, True)
    assert config.markov is not None
    assert config.markov.rank == 4
    out = capsys.readouterr().out
    assert "vllm serve" in out
    assert '"method":"mtp_placeholder"' in out


def test_init_keeps_its_hands_off_an_existing_drafter(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--layers", "own:0", "--num-speculative-tokens", "2")
    assert init(tiny_llama, tmp_path / "d", *flags) == 0
    before = (tmp_path / "d" / "model.safetensors").read_bytes()
    assert init(tiny_llama, tmp_path / "d", *flags) == 1
    assert "holds a config.json already" in capsys.readouterr().err
    assert (tmp_path / "d" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--layers", "own:9"], "0 to 3"),
        (["--layers", "own:0", "--target", "/nonexistent"], "/nonexistent"),
        (["--layers", "own:0", "--draft-vocab-size", "9"], "--draft-vocab-text"),
    ],
)
def test_init_says_what_is_wrong(
    flags: list[str],
    text: str,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "d"
    assert init(tiny_llama, out, "--num-speculative-tokens", "2", *flags) == 1
    assert text in capsys.readouterr().err
    assert not out.exists()


def test_inspect_says_what_a_drafter_is(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--layers", "shared:0,own:2", "--num-speculative-tokens", "2")
    init(tiny_llama, tmp_path / "d", *flags)
    capsys.readouterr()
    assert main(["inspect", "--drafter", str(tmp_path / "d")]) == 0
    out = capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "d")]) == 0
    assert capsys.readouterr().out == out
    for text in ["shared, reads target layer 0", "own, reads target layer 2"]:
        assert text in out
    assert "none of its own: each of its 2 layers reads a target layer's" in out
    assert "of the weights that a target step reads" in out
    assert "measured         not here" in out
    config = read_config(tmp_path / "d")
    # Two layers of 2 KV heads of 32, keys and values, 16 bits.
    assert f"target layer's, {2 * 2 * 2 * 32 * 2:,} bytes per token" in out
    assert config.target.num_key_value_heads == 2


def test_inspect_shows_a_measured_draft_beside_its_weights(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", str(installed_folder("cheap"))]) == 0
    out = capsys.readouterr().out
    assert "0.32 of the weights that a target step reads" in out
    assert "4 tokens, 1 at once: the draft 0.46, the whole step 1.71 of a step" in out
    assert main(["inspect", str(installed_folder("shared"))]) == 0
    assert "measured         not here" in capsys.readouterr().out


def test_inspect_of_nothing_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--drafter", "/nonexistent"]) == 1
    assert "/nonexistent/config.json: no such file" in capsys.readouterr().err


def test_interrupt_is_no_stack_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm_mtp.cli.doctor import Doctor

    def interrupted(self: Doctor) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Doctor, "run", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "vllm-mtp doctor: interrupted\n"


def test_doctor_says_what_is_known_of_a_target(
    tiny_llama: Path, tmp_path: Path
) -> None:
    texts = [f.text for f in examine_target(str(tiny_llama)) if not f.failed]
    assert any("llama (LlamaForCausalLM), 4 layers" in text for text in texts)
    assert any(text.startswith("Llama: V1: exact; V2: exact") for text in texts)
    assert any("copies of the target's" in text for text in texts)

    def lines(config: PreTrainedConfig, name: str) -> dict[str, Finding]:
        config.save_pretrained(tmp_path / name)
        return {f.topic: f for f in examine_target(str(tmp_path / name))}

    hybrid = Qwen3NextConfig(
        num_hidden_layers=8, architectures=["Qwen3NextForCausalLM"]
    )
    found = lines(hybrid, "hybrid")
    assert "of which [3, 7] have a KV cache" in found["target"].text
    text = "no shared ones; own ones with --own-init random; "
    assert found["layers"].text.startswith(text)
    latent = DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"])
    found = lines(latent, "latent")
    assert found["target"].failed
    assert "multi-head latent attention" in found["target"].text
    unknown = LlamaConfig(architectures=["NobodysForCausalLM"])
    found = lines(unknown, "unknown")
    assert found["family"].note
    assert "not in the table" in found["family"].text
    (missing,) = examine_target(str(tmp_path / "nowhere"))
    assert missing.failed
