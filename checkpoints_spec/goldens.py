# SPDX-License-Identifier: Apache-2.0
"""The golden drafters: how their targets, weights and expected drafts are made.

Nothing here depends on PyTorch's random numbers, which may change between
versions: every weight is a fixed function of its name and shape.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from vllm_mtp.drafter.bound import BoundDrafter, Traced
from vllm_mtp.drafter.checkpoint import load_drafter, save_drafter
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.heads import pick_greedy
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.drafter.target_facts import TargetFacts, fingerprint_of_shapes
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.texts import (
    TextBlocks,
    draft_texts,
    forward_texts,
    streams_of,
)

LORA = {
    "rank": 2,
    "alpha": 4.0,
    "modules": [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ],
}
_OWN = {"kind": "own", "intermediate_size": 20, "rms_norm_eps": 1e-5}
GOLDENS: dict[str, dict[str, Any]] = {
    "shared-lora": {
        "num_speculative_tokens": 4,
        "layers": [
            {"kind": "shared", "target_layer": 0, "lora": LORA},
            {"kind": "shared", "target_layer": 1, "lora": LORA},
        ],
        "dtype": "bfloat16",
    },
    "mixed": {
        "num_speculative_tokens": 4,
        "layers": [
            {"kind": "shared", "target_layer": 0},
            {
                "kind": "own",
                "target_layer": 2,
                "intermediate_size": 20,
                "rms_norm_eps": 1e-5,
                "qkv_bias": True,
                "qk_norm": True,
                "boundary_hidden": True,
            },
        ],
        "markov": {"rank": 2},
        "draft_vocab_size": 40,
        "dtype": "float32",
    },
    "bridged": {
        "num_speculative_tokens": 3,
        "layers": [
            {"kind": "shared", "target_layer": 0},
            {
                "kind": "own",
                "target_layer": 2,
                "intermediate_size": 20,
                "rms_norm_eps": 1e-5,
                "boundary_hidden": True,
                "bridge": True,
            },
        ],
        "dtype": "float32",
    },
    "formed": {
        "num_speculative_tokens": 3,
        "layers": [
            {
                "kind": "own",
                "target_layer": 0,
                "intermediate_size": 20,
                "rms_norm_eps": 1e-5,
                "norm_placement": "around",
                "o_bias": True,
                "qk_norm": True,
                "qk_norm_whole": True,
                "v_norm": True,
                "output_gate": True,
                "activation": "gelu_tanh",
                "output_scale": True,
            },
            {
                "kind": "own",
                "target_layer": 1,
                "intermediate_size": 20,
                "rms_norm_eps": 1e-5,
                "norm_placement": "after",
                "qk_norm": True,
                "qk_norm_after_rope": True,
            },
            {
                "kind": "own",
                "target_layer": 2,
                "intermediate_size": 20,
                "rms_norm_eps": 1e-5,
                "norm": "layer",
                "parallel": True,
            },
        ],
        "dtype": "float32",
    },
    "heads": {
        "num_speculative_tokens": 3,
        "layers": [{"kind": "mlp", "form": "square", "per_position": True}],
        "input": "boundary",
        "lm_head": "own",
        "draft_vocab_size": 40,
        "dtype": "float32",
    },
    "heads-plain": {
        "num_speculative_tokens": 3,
        "layers": [
            {
                "kind": "mlp",
                "form": "plain",
                "intermediate_size": 20,
                "per_position": True,
            },
            {"kind": "mlp", "form": "square"},
            {
                "kind": "mlp",
                "form": "gated",
                "intermediate_size": 20,
                "rms_norm_eps": 1e-5,
                "per_position": True,
            },
        ],
        "input": "boundary",
        "dtype": "float32",
    },
    "position-layers": {
        "num_speculative_tokens": 3,
        "layers": [
            # Without an anchor's row, its change acts on all of them.
            {"kind": "shared", "target_layer": 0, "lora": LORA},
            _OWN
            | {
                "target_layer": 2,
                "boundary_hidden": True,
                "bridge": True,
                "output_gate": True,
                "per_position": True,
            },
        ],
        "input": "boundary",
        "dtype": "float32",
    },
    "block-attention": {
        "num_speculative_tokens": 4,
        "layers": [
            _OWN | {"target_layer": 1, "attention": "block", "qk_norm": True},
            {
                "kind": "mlp",
                "form": "plain",
                "intermediate_size": 20,
            },
        ],
        "dtype": "float32",
    },
    "chain": {
        "num_speculative_tokens": 4,
        "layers": [
            {"kind": "shared", "target_layer": 1, "lora": LORA},
            _OWN | {"target_layer": 2, "boundary_hidden": True},
            {
                "kind": "mlp",
                "form": "gated",
                "intermediate_size": 20,
                "rms_norm_eps": 1e-5,
                "per_position": True,
            },
        ],
        "chain": {"rms_norm_eps": 1e-5},
        "draft_vocab_size": 40,
        "dtype": "float32",
    },
    "bidirectional": {
        "num_speculative_tokens": 4,
        "layers": [
            {"kind": "shared", "target_layer": 0},
            _OWN | {"target_layer": 1},
            _OWN | {"target_layer": 2, "attention": "block"},
        ],
        "block_mask": "bidirectional",
        "dtype": "float32",
    },
    "full-rank": {
        "num_speculative_tokens": 3,
        "layers": [
            {
                "kind": "shared",
                "target_layer": 0,
                "lora": LORA | {"modules": ["v_proj", "down_proj"]},
                "full_rank": ["q_proj", "k_proj", "o_proj", "gate_proj"],
            },
            {
                "kind": "shared",
                "target_layer": 2,
                "full_rank": ["v_proj", "up_proj", "down_proj"],
            },
        ],
        "dtype": "bfloat16",
    },
    "extra-rows": {
        "num_speculative_tokens": 3,
        "layers": [
            {"kind": "shared", "target_layer": 0, "lora": LORA},
            _OWN | {"target_layer": 2},
        ],
        "extra_rows": 2,
        "dtype": "float32",
    },
    "mixed-streams": {
        "num_speculative_tokens": 3,
        "layers": [
            _OWN | {"target_layer": 0, "boundary_hidden": True},
            _OWN | {"target_layer": 1, "boundary_hidden": True, "boundary_of": "bound"},
        ],
        "boundary_layers": [2, 0],
        "dtype": "float32",
    },
}
# The others' is Llama.
_CONFIG_OF_TARGET = {"mixed": Qwen3Config, "block-attention": Qwen3Config}

# All sizes differ (queries 24, keys 8), so that a transposed or swapped tensor
# cannot fit by chance.
_TARGET_SIZES = {
    "vocab_size": 64,
    "hidden_size": 18,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
TOKEN_IDS = [17, 3, 58, 41, 3, 22, 60, 9, 35, 12, 47]
PREFIX_LEN = 8
LOGIT_COLUMNS = [0, 1, 13, 39]


def fixed_values(name: str, shape: torch.Size, std: float) -> torch.Tensor:
    """Values that look random and depend on ``name`` and ``shape`` only.

    NumPy guarantees `RandomState`'s stream for good, and uniform numbers need no
    function (such as a logarithm) that differs between machines.
    """
    stream = np.random.RandomState(zlib.crc32(name.encode()))
    values = stream.uniform(-1.0, 1.0, tuple(shape)) * (std * 3**0.5)
    return torch.from_numpy(values).float()


@torch.no_grad()
def fill_weights(module: nn.Module, std: float, salt: str = "") -> None:
    """Give every weight fixed values; norms get values around 1."""
    for name, weight in module.named_parameters():
        center = 1.0 if name.endswith("norm.weight") else 0.0
        weight.copy_(center + fixed_values(salt + name, weight.shape, std))


def golden_target(name: str) -> PreTrainedModel:
    """The target of a golden drafter, in float32."""
    config = _CONFIG_OF_TARGET.get(name, LlamaConfig)(**_TARGET_SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill_weights(model, std=0.3)
    return model.eval().requires_grad_(False)


def golden_drafter(name: str, target: PreTrainedModel) -> Drafter:
    """A golden drafter, made anew. No weight is zero, so every tensor matters."""
    facts = TargetFacts.from_hf_config(target.config, name=f"golden {name}")
    fingerprint = fingerprint_of_shapes(
        {key: weight.shape for key, weight in target.state_dict().items()}
    )
    config = {
        "model_type": "mtp_placeholder",
        "format_version": 1,
        "target": facts.model_copy(
            update={"weights_fingerprint": fingerprint}
        ).model_dump(),
    } | GOLDENS[name]
    drafter = Drafter(DrafterConfig.model_validate_json(json.dumps(config)))
    fill_weights(drafter, std=0.4, salt=f"{name} ")
    if drafter.draft_vocab is not None:
        size = len(drafter.draft_vocab.token_ids)
        # 7 and 64 have no common factor: all different, and not in order.
        drafter.draft_vocab.token_ids.copy_(torch.arange(size) * 7 % 64)
    return drafter.to(getattr(torch, drafter.config.dtype))


class Blocks(NamedTuple):
    """What the drafter gives for some blocks (B blocks, k positions)."""

    hidden: torch.Tensor  # [B, k, hidden_size]
    tokens: torch.Tensor  # [B, k]
    scores: torch.Tensor  # [B, k, V], what each token was chosen from


def run_blocks(
    target: PreTrainedModel,
    drafter: Drafter,
    token_ids: torch.Tensor,
    prefix_lens: torch.Tensor,
    num_draft_tokens: int,
) -> Blocks:
    """Draft greedily at several positions of one sequence, in one forward.

    Args:
        target: The target.
        drafter: Its drafter, in the target's type.
        token_ids: ``[T]`` int64.
        prefix_lens: ``[B]`` int64; block b's anchor is ``token_ids[prefix_lens[b]]``.
        num_draft_tokens: k.
    """
    host = HFTarget(target)
    states = host.encode(token_ids, streams=streams_of(drafter.config))
    bound = BoundDrafter(drafter, host)
    text = TextBlocks(token_ids, states, prefix_lens)
    scores: list[torch.Tensor] = []

    def pick_and_keep(logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        scores.append(logits)
        return pick_greedy(logits)

    if drafter.config.chain is None:
        hidden = forward_texts(bound, [text], num_draft_tokens)
        tokens, _ = bound.draft(hidden, pick_and_keep)
    else:
        seen: dict[int, torch.Tensor] = {}
        bound.trace = seen.__setitem__
        tokens, _ = draft_texts(bound, [text], num_draft_tokens, pick_and_keep)
        hidden = seen[Traced.FINAL_NORM].unflatten(0, (-1, num_draft_tokens))
    return Blocks(hidden, tokens, torch.stack(scores, dim=1))


def draft_golden(name: str, drafter: Drafter, request: Mapping[str, Any]) -> Blocks:
    """Run a golden drafter on the input of its ``expected.json``."""
    with torch.no_grad():
        return run_blocks(
            golden_target(name),
            drafter,
            torch.tensor(request["token_ids"]),
            torch.tensor([request["prefix_len"]]),
            drafter.config.num_speculative_tokens,
        )


def write_goldens(folder: Path) -> None:
    """Write every golden drafter and what it is expected to draft."""
    for name in GOLDENS:
        save_drafter(golden_drafter(name, golden_target(name)), folder / name)
        drafter = load_drafter(folder / name, dtype=torch.float32)
        request = {"token_ids": TOKEN_IDS, "prefix_len": PREFIX_LEN}
        blocks = draft_golden(name, drafter, request)
        _require_clear_winners(name, blocks)
        expected = {
            "input": request,
            "draft_token_ids": blocks.tokens[0].tolist(),
            "logit_columns": LOGIT_COLUMNS,
            "logits": _rounded(blocks.scores[0][:, LOGIT_COLUMNS]),
        }
        path = folder / name / "expected.json"
        path.write_text(json.dumps(expected, indent=2) + "\n", "utf-8")


def _require_clear_winners(name: str, blocks: Blocks) -> None:
    """Rounding on another machine must not change which token is best."""
    best = blocks.scores.topk(2).values
    margin = float((best[..., 0] - best[..., 1]).min())
    if margin < 0.01:
        raise SystemExit(f"{name}: two tokens almost tie ({margin}); change the input")


def _rounded(values: torch.Tensor) -> list[list[float]]:
    return [[round(value, 5) for value in row] for row in values.tolist()]
