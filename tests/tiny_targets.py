# SPDX-License-Identifier: Apache-2.0
"""Tiny targets as Hugging Face folders, with the same weights on every machine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Cohere2Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhimoeConfig,
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


# Several layers of the one kind to a layer of the other, as in the real ones.
_LAYER_TYPES = [
    "sliding_attention",
    "full_attention",
    "sliding_attention",
    "sliding_attention",
]
_GEMMA = {
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 24,
    "final_logit_softcapping": 20.0,
    "tie_word_embeddings": True,  # vLLM knows no other Gemma 2
    "layer_types": _LAYER_TYPES,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [4.0 + 0.5 * i for i in range(16)],
}
"""Of a tiny Phi-3, which is made for 512 tokens."""
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
    "phi3_longrope": _Family(
        Phi3Config,
        _QUOTIENT
        | {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 32},
    ),
    # The full layer has no RoPE, and no norm stands before a layer's parts.
    "exaone4": _Family(
        Exaone4Config, {"sliding_window": WINDOW, "layer_types": _LAYER_TYPES}
    ),
    # The full layer has no RoPE, attention and MLP stand side by side. vLLM's windows
    # are one token longer than transformers', so no text of the parity tests is as
    # long.
    "cohere2": _Family(
        Cohere2Config,
        _QUOTIENT
        | {
            "sliding_window": 100,
            "layer_types": _LAYER_TYPES,
            "tie_word_embeddings": True,  # vLLM knows no other
            "logit_scale": 0.0625,
        },
    ),
    "gpt_oss": _Family(
        GptOssConfig,
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    # LayerNorms, of which vLLM takes plain ones.
    "phimoe": _Family(
        PhimoeConfig,
        _QUOTIENT | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
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
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            weight.data += 2.0  # as large as the scores
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
