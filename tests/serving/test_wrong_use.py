# SPDX-License-Identifier: Apache-2.0
"""Wrong use is refused before the engine starts, with what is wrong and the fix.

``create_engine_config`` is what ``vllm serve`` and ``LLM(...)`` call first.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm.engine.arg_utils import EngineArgs

from tests.tiny_targets import WINDOW, make_tiny_llama
from vllm_mtp.drafter.checkpoint import save_drafter
from vllm_mtp.errors import MTPError
from vllm_mtp.installed import installed_folder
from vllm_mtp.serving.loading import load_bound_drafter
from vllm_mtp.serving.settings import ALLOWED_KEYS
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter

Drafter = Callable[[str, str], Path]


def start(target: Path, spec: dict[str, Any], **settings: Any) -> Any:
    """Everything that happens before an engine is built."""
    return EngineArgs(
        model=str(target),
        skip_tokenizer_init=True,
        enforce_eager=True,
        speculative_config={"method": "mtp_placeholder"} | spec,
        **settings,
    ).create_engine_config()


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    change(config)
    path.write_text(json.dumps(config), "utf-8")


def edit_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["placeholders"][0, 0] = float("nan")


# name: (what is done to a good drafter's folder, what the message must hold)
BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "config missing": (
        lambda f: (f / "config.json").unlink(),
        ["config.json: no such file", "vllm-mtp init"],
    ),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{", "utf-8"),
        ["config.json: not a valid drafter config"],
    ),
    "unknown key": (
        lambda f: edit_config(f, lambda c: c.update(window=256)),
        ["window: unknown key (got 256)", "remove it"],
    ),
    "missing key": (
        lambda f: edit_config(f, lambda c: c.pop("layers")),
        ["layers: missing"],
    ),
    "newer format": (
        lambda f: edit_config(f, lambda c: c.update(format_version=2)),
        ["format_version: got '2'", "update vllm-mtp"],
    ),
    "binding out of range": (
        lambda f: edit_config(f, lambda c: c["layers"][0].update(target_layer=4)),
        ["layers.0.target_layer: got 4", "0 to 3"],
    ),
    "weights missing": (
        lambda f: (f / "model.safetensors").unlink(),
        ["model.safetensors: no such file", "no pickle"],
    ),
    "weights cut off": (
        lambda f: os.truncate(f / "model.safetensors", 300),
        ["not a whole safetensors file", "again"],
    ),
    "tensor missing": (
        lambda f: edit_tensors(f, lambda t: t.pop("markov.gate.bias")),
        ["missing tensor 'markov.gate.bias'"],
    ),
    "tensor too many": (
        lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))),
        ["unknown tensor 'extra'"],
    ),
    "tensor misshapen": (
        lambda f: edit_tensors(f, lambda t: t.update(placeholders=torch.zeros(2, 64))),
        ["'placeholders' has shape [2, 64], expected [3, 64]"],
    ),
    "tensor mistyped": (
        lambda f: edit_tensors(
            f, lambda t: t.update(placeholders=t["placeholders"].double())
        ),
        ["'placeholders' has type F64, expected F32"],
    ),
    "not finite": (
        lambda f: edit_tensors(f, set_nan),
        ["NaN or infinite values in 'placeholders' (1 of 192 values)"],
    ),
}


def test_a_window_that_cannot_be_read_is_refused(
    tiny_targets: dict[str, Path], tiny_drafter: Drafter, tmp_path: Path
) -> None:
    folder = tmp_path / "drafter"
    shutil.copytree(tiny_drafter("mistral", "windowed"), folder)
    start_in = {"model": str(folder)}
    start(tiny_targets["mistral"], start_in, block_size=64)  # good before
    with pytest.raises(MTPError, match=f"{folder}: block_size: .* blocks of 96 tokens"):
        start(tiny_targets["mistral"], start_in, block_size=96)
    edit_config(folder, lambda c: c.update(prefix_window=WINDOW - 1))
    with pytest.raises(MTPError, match=f"{folder}: prefix_window: got {WINDOW - 1}"):
        start(tiny_targets["mistral"], start_in)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint_is_refused(
    name: str, tiny_targets: dict[str, Path], tiny_drafter: Drafter, tmp_path: Path
) -> None:
    damage, expected = BROKEN[name]
    folder = tmp_path / "drafter"
    shutil.copytree(tiny_drafter("llama", "mixed"), folder)
    start(tiny_targets["llama"], {"model": str(folder)})  # good before
    damage(folder)
    with pytest.raises(MTPError) as error:
        start(tiny_targets["llama"], {"model": str(folder)})
    for text in [str(folder), *expected]:
        assert text in str(error.value)


# name: (how the target differs, the fact that the message names)
OTHER_TARGETS = {
    "hidden size": ({"hidden_size": 128}, "target.hidden_size", "64", "128"),
    "layers": ({"num_hidden_layers": 5}, "target.num_hidden_layers", "4", "5"),
    "heads": ({"num_attention_heads": 8}, "target.num_attention_heads", "4", "8"),
    "KV heads": ({"num_key_value_heads": 4}, "target.num_key_value_heads", "2", "4"),
    "head size": ({"head_dim": 64}, "target.head_dim", "32", "64"),
    "vocabulary": ({"vocab_size": 640}, "target.vocab_size", "512", "640"),
    "RoPE": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "target.rope_parameters",
        "10000.0",
        "500000.0",
    ),
}


@pytest.mark.parametrize("name", OTHER_TARGETS)
def test_wrong_target_is_refused(
    name: str, tiny_drafter: Drafter, tmp_path: Path
) -> None:
    changes, *texts = OTHER_TARGETS[name]
    target = make_tiny_llama(tmp_path / "other", **changes)
    with pytest.raises(MTPError) as error:
        start(target, {"model": str(tiny_drafter("llama", "shared-4"))})
    for text in [*texts, "vllm-mtp init"]:
        assert text in str(error.value)


# name: (speculative_config, engine settings, what the message must hold)
WRONG_USE: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "more tokens than trained": (
        {"num_speculative_tokens": 5},
        {},
        ["num_speculative_tokens: got 5", "1 to 4"],
    ),
    "no tokens": ({"num_speculative_tokens": 0}, {}, ["got 0", "1 to 4"]),
    "tokens as text": (
        {"num_speculative_tokens": "4"},
        {},
        ["got '4'", "expected an integer"],
    ),
    "unknown key": (
        {"num_tokens": 4},
        {},
        ["does not take 'num_tokens'", *ALLOWED_KEYS],
    ),
    "key of another method": (
        {"prompt_lookup_max": 4},
        {},
        ["does not take 'prompt_lookup_max'", "Remove"],
    ),
    "no such drafter": (
        {"model": "/nonexistent/drafter"},
        {},
        ["no such folder: '/nonexistent/drafter'"],
    ),
    "no such hub id": (
        {"model": "nobody/nothing"},
        {},
        ["'nobody/nothing' is no folder here", "could not be fetched"],
    ),
    "another way to verify": (
        {"rejection_sample_method": "synthetic"},
        {},
        ["rejection_sample_method: got 'synthetic', expected 'standard' or 'block'"],
    ),
    "a file as drafter": (
        {"model": __file__},
        {},
        ["is a file", "config.json and model.safetensors"],
    ),
    "pipeline parallel": (
        {},
        {"pipeline_parallel_size": 2},
        ["pipeline_parallel_size=2", "Use 1"],
    ),
    "prompts as embeddings, scheduled ahead": (
        {},
        {"enable_prompt_embeds": True, "async_scheduling": True},
        ["async_scheduling is on", "enable_prompt_embeds", "Leave out one"],
    ),
    "a KV connector that nobody has tried": (
        {},
        {
            "kv_transfer_config": {
                "kv_connector": "LMCacheConnectorV1",
                "kv_role": "kv_both",
            }
        },
        ["kv_transfer_config.kv_connector: got 'LMCacheConnectorV1'", "leave out"],
    ),
    "ranks that do not divide the heads": (
        {},
        {"tensor_parallel_size": 3},
        ["=3 does not fit", "target.num_attention_heads: got 4", "fits: 1, 2, 4."],
    ),
}


@pytest.mark.parametrize("name", WRONG_USE)
def test_wrong_use_is_refused(
    name: str, tiny_targets: dict[str, Path], tiny_drafter: Drafter
) -> None:
    spec, settings, expected = WRONG_USE[name]
    good = {"model": str(tiny_drafter("llama", "shared-4"))}
    with pytest.raises(MTPError) as error:
        start(tiny_targets["llama"], good | spec, **settings)
    for text in expected:
        assert text in str(error.value)


def test_a_drafter_that_is_only_evaluated_is_refused(
    tiny_targets: dict[str, Path], tmp_path: Path
) -> None:
    target, options = tiny_targets["llama"], DrafterOptions(extra_rows=2)
    save_drafter(new_drafter(target, "shared:0", 2, options), tmp_path / "d")
    with pytest.raises(MTPError, match="/d: extra_rows: got 2, expected 0.*eval"):
        start(target, {"model": str(tmp_path / "d")})


@pytest.mark.parametrize("embeds", [True, False])
def test_nothing_is_scheduled_ahead_of_embeddings(
    embeds: bool,
    tiny_targets: dict[str, Path],
    tiny_drafter: Drafter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the user did not choose; on a CPU vLLM turns it off at the end anyway."""
    chosen = []
    create = EngineArgs.create_speculative_config

    def watched(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        config = create(self, *args, **kwargs)
        chosen.append(self.async_scheduling)
        return config

    monkeypatch.setattr(EngineArgs, "create_speculative_config", watched)
    drafter = {"model": str(tiny_drafter("llama", "shared-4"))}
    start(tiny_targets["llama"], drafter, enable_prompt_embeds=embeds)
    assert chosen == [False if embeds else None]


@pytest.mark.parametrize("is_simple", ["0", "1"])
def test_a_connector_that_vllm_makes_of_other_settings(
    is_simple: str,
    tiny_targets: dict[str, Path],
    tiny_drafter: Drafter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is there only in the config that a worker has; judged before the drafter is
    read."""
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", is_simple)
    config = start(
        tiny_targets["llama"],
        {"model": str(tiny_drafter("llama", "shared-4"))},
        kv_offloading_size=1.0,
    )
    nothing = torch.nn.Module()
    with pytest.raises((MTPError, AssertionError)) as error:
        load_bound_drafter(nothing, config, torch.device("cpu"))
    refused = "kv_connector: got 'SimpleCPUOffloadConnector'" in str(error.value)
    assert refused == (is_simple == "1")


def test_replicas_of_a_mixture_of_experts_take_own_layers_only(
    tiny_targets: dict[str, Path], tiny_drafter: Drafter
) -> None:
    target = tiny_targets["qwen3_moe"]
    shared, own = (
        {"model": str(tiny_drafter("qwen3_moe", name))}
        for name in ("shared-4", "own-random")
    )
    start(target, own, data_parallel_size=2)
    with pytest.raises(MTPError) as error:
        start(target, shared, data_parallel_size=2)
    for text in ("data_parallel_size=2", "shared layers would wait", "--layers own:"):
        assert text in str(error.value)


def test_target_without_keys_and_values_per_head_is_refused(tmp_path: Path) -> None:
    """Multi-head latent attention, as in DeepSeek."""
    from transformers import DeepseekV3Config

    target = tmp_path / "mla"
    config = DeepseekV3Config(
        num_hidden_layers=2, architectures=["DeepseekV3ForCausalLM"]
    )
    config.save_pretrained(target)
    with pytest.raises(MTPError, match="latent attention .*Use a target with ordinary"):
        start(target, {})


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_other_rope_is_refused_where_own_layers_were_trained(
    tiny_targets: dict[str, Path], tiny_drafter: Drafter, tmp_path: Path
) -> None:
    """By ``--hf-overrides``, as for long texts."""
    overrides = {"rope_parameters": YARN}
    target = tiny_targets["llama"]
    own = shutil.copytree(tiny_drafter("llama", "own-some"), tmp_path / "own")
    with pytest.raises(
        MTPError, match="hf-overrides.*'yarn'.*set target.rope_parameters"
    ):
        start(target, {"model": str(own)}, hf_overrides=overrides)
    edit_config(own, lambda config: config["target"].update(overrides))
    start(target, {"model": str(own)}, hf_overrides=overrides)
    shared = str(tiny_drafter("llama", "shared-4"))
    start(target, {"model": shared}, hf_overrides=overrides)


def test_a_flag_and_a_key_that_differ_are_refused(
    tiny_targets: dict[str, Path], tiny_drafter: Drafter
) -> None:
    folder = str(tiny_drafter("llama", "shared-4"))
    spec = {"model": folder, "num_speculative_tokens": 2}
    with pytest.raises(MTPError, match="--spec-tokens and .* differ: 3 and 2"):
        start(tiny_targets["llama"], spec, spec_tokens=3)


def test_mamba_target_is_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig

    target = tmp_path / "mamba"
    MambaConfig(
        num_hidden_layers=2, architectures=["MambaForCausalLM"]
    ).save_pretrained(target)
    with pytest.raises(MTPError, match="no KV cache .*Use a target with attention"):
        start(target, {})


def test_method_only_lists_what_was_tried(tiny_targets: dict[str, Path]) -> None:
    with pytest.raises(MTPError) as error:
        start(tiny_targets["llama"], {})
    for text in [
        str(tiny_targets["llama"] / "mtp_placeholder"),
        "drafter 'shared' of vllm-mtp-smollm2-135m-instruct: target.",
        "vllm-mtp init",
    ]:
        assert text in str(error.value)


def test_method_only_takes_the_folder_inside_the_target(
    tiny_drafter: Drafter, tmp_path: Path
) -> None:
    target = make_tiny_llama(tmp_path / "target")
    shutil.copytree(tiny_drafter("llama", "own-some"), target / "mtp_placeholder")
    config = start(target, {}).speculative_config
    assert config.model == str(target / "mtp_placeholder")
    assert config.num_speculative_tokens == 3


def test_method_only_finds_the_installed_drafter(smollm2: Path) -> None:
    config = start(smollm2, {}).speculative_config
    assert config.model == str(installed_folder("cheap"))
    assert config.num_speculative_tokens == 4


def test_same_shape_but_other_weights_is_not_the_installed_drafters_target(
    smollm2: Path, tmp_path: Path
) -> None:
    """The config alone does not identify a target: names and shapes count too."""
    target = tmp_path / "look-alike"
    target.mkdir()
    for file in smollm2.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, target)
    save_file({"model.other.weight": torch.zeros(1)}, target / "model.safetensors")
    with pytest.raises(MTPError, match="other names or shapes"):
        start(target, {})


def test_a_good_drafter_is_taken(
    tiny_targets: dict[str, Path], tiny_drafter: Drafter
) -> None:
    """So that no refusal above is for another reason."""
    folder = str(tiny_drafter("llama", "shared-4"))
    config = start(tiny_targets["llama"], {"model": folder}).speculative_config
    assert (config.model, config.num_speculative_tokens) == (folder, 4)
    fewer = {"model": folder, "num_speculative_tokens": 1}
    assert start(tiny_targets["llama"], fewer).num_speculative_tokens == 1
