# SPDX-License-Identifier: Apache-2.0
"""Tiny targets as Hugging Face folders, with the same weights on every machine."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec.goldens import fill_weights

VOCAB_SIZE = 512
NUM_LAYERS = 4

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
# Wide enough that the next token depends on the text; with the usual 0.02 a tiny
# model repeats one token for ever, and every drafter looks right.
_STD = 0.3


def make_tiny_llama(folder: Path, **overrides: Any) -> Path:
    """Save a tiny Llama in float32; returns the folder.

    Args:
        folder: Where to; made if need be.
        overrides: Other values for the config.
    """
    return _save(LlamaConfig(**_SIZES | overrides), folder)


def make_tiny_qwen3(folder: Path, **overrides: Any) -> Path:
    """Save a tiny Qwen3 (a norm per query and key head); as `make_tiny_llama`."""
    return _save(Qwen3Config(**_SIZES | overrides), folder)


def _save(config: PreTrainedConfig, folder: Path) -> Path:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill_weights(model, _STD)
    model.save_pretrained(folder)
    return folder
