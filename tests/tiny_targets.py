# SPDX-License-Identifier: Apache-2.0
"""Tiny targets as Hugging Face folders, with the same weights on every machine."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Cohere2Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    Glm4MoeConfig,
    GlmOcrConfig,
    GptOssConfig,
    GraniteConfig,
    LagunaConfig,
    LlamaConfig,
    LlavaConfig,
    MiMoV2FlashConfig,
    MiniMaxM2Config,
    Mistral3Config,
    MistralConfig,
    MuseGlimmerConfig,
    NemotronHConfig,
    Olmo3Config,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen3VLConfig,
    SeedOssConfig,
    SmolLM3Config,
)
from transformers.models.auto import AutoModelForCausalLM, AutoModelForImageTextToText

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
_STD = EMBEDDING_STD = 0.3


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
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_GEMMA = {
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 24,
    "final_logit_softcapping": 20.0,
    "tie_word_embeddings": True,  # vLLM knows no other Gemma 2
    "layer_types": _LAYER_TYPES,
}
_GEMMA_3 = _GEMMA | {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
}
_GDN = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_conv_kernel_dim": 4,
    # vLLM's kernel for CPUs takes no other size.
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
_M_ROPE = {
    "rope_parameters": _ROPE
    | {
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
}
_IMAGES = {
    "image_token_id": 508,
    "video_token_id": 509,
    "vision_start_token_id": 510,
    "vision_end_token_id": 511,
    "tie_word_embeddings": False,
}
_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "patch_size": 4,
}
_SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def _texts(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The text part's config of a model that sees as well."""
    return _without_null_head_dim(_SIZES | changes)


def _without_null_head_dim(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if (k, v) != ("head_dim", None)}


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
    "gemma3": _Family(Gemma3TextConfig, _GEMMA_3),
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
    # Full and sliding layers differ in heads; every layer ends with a factor.
    "gemma4": _Family(
        Gemma4TextConfig,
        {
            "sliding_window": WINDOW,
            "layer_types": [*_LAYER_TYPES[:3], "full_attention"],
            "global_head_dim": 64,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "final_logit_softcapping": 20.0,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "sliding_attention": _ROPE,
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1e6,
                },
            },
        },
    ),
    "glm4": _Family(Glm4Config),
    "glm4_moe": _Family(
        Glm4MoeConfig,
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "num_mtp_layers": 0,
        },
    ),
    # One expert: vLLM's router on CPUs knows softmax alone, this family's is sigmoid,
    # and of a single choice both make 1.
    "minimax_m2": _Family(
        MiniMaxM2Config,
        {
            "num_local_experts": 1,
            "num_experts_per_tok": 1,
            "rotary_dim": 16,
            "scoring_func": "softmax",
            "use_routing_bias": True,
        },
    ),
    "ernie4_5": _Family(Ernie4_5Config),
    "ernie4_5_moe": _Family(
        Ernie4_5_MoeConfig,
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    # Through vLLM's Transformers backend.
    "olmo3": _Family(
        Olmo3Config, {"sliding_window": WINDOW, "layer_types": _LAYER_TYPES}
    ),
    "smollm3": _Family(SmolLM3Config, {"no_rope_layer_interval": 2}),
    "seed_oss": _Family(SeedOssConfig),
    "granite": _Family(
        GraniteConfig,
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
    ),
    "llama_yarn": _Family(
        LlamaConfig,
        {
            "rope_parameters": _ROPE
            | {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama_dynamic": _Family(
        LlamaConfig,
        {"rope_parameters": _ROPE | {"rope_type": "dynamic", "factor": 2.0}},
    ),
    # Hybrids: every other layer has a state in place of a cache.
    "qwen3_next": _Family(
        Qwen3NextConfig,
        _GDN
        | _EXPERTS
        | {
            "rope_parameters": _ROPE | {"partial_rotary_factor": 0.25},
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "qwen3_5": _Family(
        Qwen3_5Config,
        {
            "text_config": _texts(_GDN | _M_ROPE),
            "vision_config": _VISION
            | {"out_hidden_size": 64, "num_position_embeddings": 16},
        }
        | _IMAGES,
    ),
    # Of these, the text part is a target.
    "qwen2_5_vl": _Family(
        Qwen2_5_VLConfig,
        {
            "text_config": _texts(
                _QUOTIENT | {"rope_parameters": _ROPE | {"mrope_section": [4, 6, 6]}}
            ),
            "vision_config": _VISION
            | {
                "out_hidden_size": 128,
                "window_size": 16,
                "fullatt_block_indexes": [0],
            },
        }
        | _IMAGES,
    ),
    "qwen3_vl": _Family(
        Qwen3VLConfig,
        {
            "text_config": _texts(
                {
                    "rope_parameters": _ROPE
                    | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
                }
            ),
            "vision_config": _VISION
            | {
                "depth": 2,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        }
        | _IMAGES,
    ),
    "qwen3_5_moe": _Family(
        Qwen3_5MoeConfig,
        {
            "text_config": _texts(_GDN | _EXPERTS | _M_ROPE),
            "vision_config": _VISION
            | {"out_hidden_size": 64, "num_position_embeddings": 16},
        }
        | _IMAGES,
    ),
    "glm_ocr": _Family(
        GlmOcrConfig,
        {
            "text_config": _texts(
                _QUOTIENT
                | {
                    "rope_parameters": _ROPE
                    | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
                }
            ),
            "vision_config": _VISION | {"out_hidden_size": 128, "image_size": 16},
            "image_token_id": 508,
            "video_token_id": 509,
            "image_start_token_id": 504,
            "image_end_token_id": 505,
            "video_start_token_id": 506,
            "video_end_token_id": 507,
            "tie_word_embeddings": False,
        },
    ),
    # Dense, since vLLM's router on CPUs does not know theirs.
    "laguna": _Family(
        LagunaConfig,
        {
            "layer_types": _LAYER_TYPES,
            "sliding_window": WINDOW,
            "num_attention_heads_per_layer": [4, 2, 4, 4],
            "mlp_layer_types": ["dense"] * NUM_LAYERS,
        },
    ),
    "mimo_v2": _Family(
        MiMoV2FlashConfig,
        {
            "layer_types": _LAYER_TYPES,
            "sliding_window": WINDOW,
            "head_dim": 64,
            "v_head_dim": 64,
            "mlp_layer_types": ["dense"] * NUM_LAYERS,
            "rope_parameters": {
                "full_attention": _ROPE | {"partial_rotary_factor": 0.5},
                "sliding_attention": _ROPE | {"partial_rotary_factor": 0.5},
            },
            # As in the published configs, from which vLLM reads.
            "hybrid_layer_pattern": [1, 0, 1, 1],
            "moe_layer_freq": [0] * NUM_LAYERS,
            "layernorm_epsilon": 1e-5,
            "sliding_window_size": WINDOW,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_head_dim": 64,
            "swa_v_head_dim": 64,
            "add_swa_attention_sink_bias": True,
            "rope_theta": 1e4,
            "swa_rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
    ),
    "muse_glimmer": _Family(
        MuseGlimmerConfig,
        {
            "text_config": _texts(
                {
                    "sliding_window": WINDOW,
                    "layer_types": _LAYER_TYPES,
                    "layer_rope_theta": [1e4, 0, 1e4, 1e4],
                    "no_rope_layers": [1, 0, 1, 1],  # which vLLM reads
                    "rope_parameters": _ROPE,
                    "output_multiplier": 0.5,
                }
            ),
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 4,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
                "max_position_embeddings": 16,
                "output_dim": 128,
            },
            "image_token_id": 508,
            "video_token_id": 509,
            "out_hidden_size": 128,
            "projector_hidden_size": 32,
            "tie_word_embeddings": False,
        },
    ),
    "nemotron_h": _Family(
        NemotronHConfig,
        {
            "layers_block_type": [
                "linear_attention",
                "full_attention",
                "mlp",
                "full_attention",
            ],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 128,
        },
    ),
    "gemma3_mm": _Family(
        Gemma3Config,
        {
            "text_config": _texts(_GEMMA_3 | {"final_logit_softcapping": None}),
            "vision_config": _SIGLIP,
            "mm_tokens_per_image": 4,
            "boi_token_index": 509,
            "eoi_token_index": 510,
            "image_token_index": 511,
            "tie_word_embeddings": True,
        },
    ),
    "llava": _Family(
        LlavaConfig,
        {
            "text_config": _texts({"model_type": "llama"}),
            "vision_config": _SIGLIP
            | {
                "model_type": "clip_vision_model",
                "num_hidden_layers": 2,
                "projection_dim": 32,
            },
            "image_token_index": 511,
            "image_seq_length": 16,
            "vision_feature_layer": -2,
            "tie_word_embeddings": False,
        },
    ),
    "mistral3": _Family(
        Mistral3Config,
        {
            "text_config": _texts({"model_type": "mistral", "sliding_window": None}),
            "vision_config": _SIGLIP | {"model_type": "pixtral"},
            "image_token_index": 511,
            "tie_word_embeddings": False,
        },
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
    sees = "text_config" in changes
    values = copy.deepcopy({} if sees else _SIZES) | changes
    if sees and overrides:
        values["text_config"] = values["text_config"] | overrides
    else:
        values |= overrides
    # A copy: some configs write into the lists that they are given.
    config = make(**copy.deepcopy(_without_null_head_dim(values)))
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    fill_weights(model, _STD)
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            weight.data += 2.0  # as large as the scores
        if name.endswith("e_score_correction_bias"):
            weight.data.zero_()  # vLLM leaves it out on CPUs
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
    "quantization_status": "compressed",
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
