# SPDX-License-Identifier: Apache-2.0
"""Tiny targets as Hugging Face folders, with the same weights on every machine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec.goldens import fill_weights

VOCAB_SIZE = 512
NUM_LAYERS = 4
WINDOW = 48
"""Tokens that a sliding-window layer of a tiny target reads: no multiple of a cache
block, and well below the tests' prompts."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Not hidden_size / heads, so that nothing may take one for the other.
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# For families that know no `head_dim`; vLLM's CPU attention takes 32 at least.
_QUOTIENT = {"hidden_size": 128, "head_dim": None}
# Wide enough that the next token depends on the text; with the usual 0.02 a tiny
# model repeats one token for ever, and every drafter looks right.
_STD = 0.3


class _Family(NamedTuple):
    config: type[PreTrainedConfig]
    changes: Mapping[str, Any] = {}


_GEMMA = {
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 24,
    "final_logit_softcapping": 20.0,
    "tie_word_embeddings": True,  # vLLM knows no other Gemma 2
    # Several layers of the one kind to a layer of the other, as in the real ones.
    "layer_types": [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "sliding_attention",
    ],
}
FAMILIES = {
    "llama": _Family(LlamaConfig),
    "qwen2": _Family(Qwen2Config, _QUOTIENT),
    "qwen3": _Family(Qwen3Config),
    "mistral": _Family(MistralConfig, {"sliding_window": WINDOW}),
    "gemma2": _Family(Gemma2Config, _GEMMA | {"attn_logit_softcapping": 10.0}),
    "gemma3": _Family(
        Gemma3TextConfig,
        _GEMMA
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "phi3": _Family(Phi3Config, _QUOTIENT),
    "qwen3_moe": _Family(
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
}


def make_tiny(family: str, folder: Path, **overrides: Any) -> Path:
    """Save a tiny target in float32; returns the folder.

    Args:
        family: One of `FAMILIES`.
        folder: Where to; made if need be.
        overrides: Other values for the config.
    """
    make, changes = FAMILIES[family]
    values = _SIZES | changes | overrides
    config = make(**{k: v for k, v in values.items() if (k, v) != ("head_dim", None)})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill_weights(model, _STD)
    model.save_pretrained(folder)
    return folder


def make_tiny_llama(folder: Path, **overrides: Any) -> Path:
    """As `make_tiny`."""
    return make_tiny("llama", folder, **overrides)


def make_tiny_qwen3(folder: Path, **overrides: Any) -> Path:
    """As `make_tiny`; it has a norm per query and key head."""
    return make_tiny("qwen3", folder, **overrides)


_W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def make_tiny_w8a8(folder: Path) -> Path:
    """Save a tiny Llama with int8 weights, a scale per output channel."""
    make_tiny_llama(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj." in name]:
        weight = tensors[name]
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = _W8A8
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder
