# SPDX-License-Identifier: Apache-2.0
"""What a draft costs, read off its config: parameters and bytes, no timing."""

from dataclasses import dataclass
from typing import get_args

import torch

from vllm_mtp.drafter.config import DrafterConfig, LinearName, SharedLayerConfig
from vllm_mtp.drafter.lora import linear_sizes
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.drafter.target_facts import TargetFacts


@dataclass(frozen=True)
class DraftCost:
    """Cost of drafting, beside the same figures of one target step.

    Attributes:
        drafter_parameters: Weights that the drafter brings (its checkpoint).
        shared_parameters: Weights of target layers that a draft runs through.
        head_parameters: LM-head weights that a draft multiplies with.
        target_parameters: Weights of one target forward, LM head included.
        own_kv_bytes_per_token: KV cache that the drafter keeps. Always 0.
        kv_bytes_read_per_token: Cache read by one draft, per token of prefix
            (16-bit cache).
        target_kv_bytes_per_token: Cache that the target keeps, per token.
    """

    drafter_parameters: int
    shared_parameters: int
    head_parameters: int
    target_parameters: int
    own_kv_bytes_per_token: int
    kv_bytes_read_per_token: int
    target_kv_bytes_per_token: int

    @property
    def draft_parameters(self) -> int:
        """Weights that one draft of k tokens touches."""
        return self.drafter_parameters + self.shared_parameters + self.head_parameters

    @property
    def relative_cost(self) -> float:
        """Weights touched by a draft over those of a target step. At batch 1
        decoding is bound by reading weights, so this estimates the time ratio."""
        return self.draft_parameters / self.target_parameters


def draft_cost(config: DrafterConfig) -> DraftCost:
    """Estimate the cost of a draft."""
    facts = config.target
    layer = _layer_parameters(facts)
    kv_layer = 2 * facts.num_key_value_heads * facts.head_dim * 2
    shared = sum(isinstance(item, SharedLayerConfig) for item in config.layers)
    head = facts.vocab_size * facts.hidden_size
    with torch.device("meta"):
        own = sum(p.numel() for p in Drafter(config).parameters())
    return DraftCost(
        drafter_parameters=own,
        shared_parameters=shared * layer,
        head_parameters=(config.draft_vocab_size or facts.vocab_size)
        * facts.hidden_size,
        target_parameters=facts.num_hidden_layers * layer + head,
        own_kv_bytes_per_token=0,
        kv_bytes_read_per_token=len(config.layers) * kv_layer,
        target_kv_bytes_per_token=facts.num_hidden_layers * kv_layer,
    )


def _layer_parameters(facts: TargetFacts) -> int:
    """Weights of one dense Llama-like target layer."""
    sizes = [linear_sizes(facts, name) for name in get_args(LinearName)]
    return sum(a * b for a, b in sizes) + 2 * facts.hidden_size
