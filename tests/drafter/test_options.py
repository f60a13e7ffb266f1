# SPDX-License-Identifier: Apache-2.0
"""One field of `DrafterConfig` gives a knob its flag, its limits and its way there."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from vllm_mtp.cli.init import Init
from vllm_mtp.cli.train import Train
from vllm_mtp.drafter.config import DrafterConfig, Knob
from vllm_mtp.drafter.options import DrafterOptions, help_of
from vllm_mtp.errors import MTPError
from vllm_mtp.torch_host.new_drafter import new_drafter

# What is no plain value of the whole drafter, or is asked for by name.
NO_KNOBS = {
    *("model_type", "format_version", "target"),
    *("layers", "num_speculative_tokens", "markov", "noise"),
    *("chain", "boundary_layers"),
}
KNOBS = {
    name
    for name, info in DrafterConfig.model_fields.items()
    if any(isinstance(mark, Knob) for mark in info.metadata)
}


def test_every_field_of_the_config_is_a_knob_or_known_to_be_none() -> None:
    assert set(DrafterConfig.model_fields) - NO_KNOBS == KNOBS
    assert "prefix_window" in KNOBS


@pytest.mark.parametrize("command", [Init, Train])
@pytest.mark.parametrize("name", [*sorted(KNOBS), "num_speculative_tokens"])
def test_a_flag_says_what_the_config_says(command: Any, name: str) -> None:
    flags = {field.name: field.metadata["help"] for field in fields(command)}
    assert flags[name].startswith(help_of(DrafterConfig, name))


def test_values_reach_the_config(tiny_llama: Path) -> None:
    options = DrafterOptions(dtype="float16", prefix_window=96)
    config = new_drafter(tiny_llama, "own:0", 2, options).config
    assert (config.dtype, config.prefix_window) == ("float16", 96)
    assert set(options.knobs()) == KNOBS


def test_a_flag_of_0_is_null(tiny_llama: Path) -> None:
    options = DrafterOptions(
        prefix_window=0, draft_vocab_size=0, lora_rank=0, markov_rank=0
    )
    config = new_drafter(tiny_llama, "shared:0", 2, options).config
    plain = new_drafter(tiny_llama, "shared:0", 2).config
    assert config == plain
    assert config.prefix_window is None


@pytest.mark.parametrize(
    ("values", "k", "message"),
    [
        ({}, 0, "num_speculative_tokens: got 0, expected a number greater than or"),
        ({}, 65, "num_speculative_tokens: got 65, expected .* less than or .* 64"),
        ({"prefix_window": -3}, 4, "prefix_window: got -3, expected .* equal to 1"),
        ({"draft_vocab_size": -4}, 4, "draft_vocab_size: got -4, expected .* to 1"),
        ({"dtype": "int8"}, 4, "dtype: got 'int8', expected 'bfloat16', 'float16' or"),
        ({"lora_rank": -1}, 4, "lora_rank: got -1, expected .* equal to 1"),
        ({"lora_rank": 2, "lora_alpha": -1.0}, 4, "lora_alpha: got -1.0, expected"),
        (
            {"lora_rank": 2, "lora_modules": ["lm_head"]},
            4,
            "lora_modules.0: got 'lm_head', expected 'q_proj'",
        ),
        (
            {"lora_rank": 2, "lora_modules": ["q_proj", "q_proj"]},
            4,
            "lora_modules: named twice",
        ),
        ({"markov_rank": 2**25}, 4, "markov_rank: got 33554432, expected"),
        ({"mask_token_id": 9}, 4, "mask_token_id: got 9, but placeholder_kind is"),
        (
            {"placeholder_kind": "noise", "mask_token_id": -1},
            4,
            "mask_token_id: got -1, expected 1 to",
        ),
        ({"mask_token_id": 0}, 4, "mask_token_id: got 0, but placeholder_kind is"),
        (
            {"placeholder_kind": "noise", "mask_token_id": 0},
            4,
            "mask_token_id: got 0, expected 1 to",
        ),
        ({"noise_low": 0}, 4, "noise_low: got 0, but placeholder_kind is 'trained'"),
        ({"noise_low": 5}, 4, "noise_low: got 5, but placeholder_kind is 'trained'"),
        (
            {"placeholder_kind": "noise", "noise_low": -1},
            4,
            "noise_low: got -1, expected 0 to",
        ),
        (
            {"placeholder_kind": "noise", "noise_low": 9, "mask_token_id": 9},
            4,
            "noise_low: got 9, expected 0 to 8",
        ),
    ],
)
def test_a_value_out_of_its_limits_is_refused_in_one_line(
    values: dict[str, Any], k: int, message: str, tmp_path: Path
) -> None:
    """Before the target is read: this one does not exist."""
    with pytest.raises(MTPError, match=f"^{message}") as error:
        new_drafter(tmp_path / "none", "own:0", k, DrafterOptions(**values))
    assert "\n" not in str(error.value)


def test_a_size_without_its_tokens_is_refused(tiny_llama: Path) -> None:
    options = DrafterOptions(draft_vocab_size=3)
    with pytest.raises(MTPError, match="draft_vocab_size: got 3, .* has 2; give as"):
        new_drafter(tiny_llama, "own:0", 2, options, (5, 7))
