# SPDX-License-Identifier: Apache-2.0
"""What a draft reads, off its config: weights and bytes of cache. Nothing is timed."""

from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch

from vllm_mtp.drafter.config import DrafterConfig, LinearName
from vllm_mtp.drafter.lora import linear_sizes
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.drafter.target_facts import TargetFacts


class MarkovWeights(NamedTuple):
    """Weights of a Markov correction (`drafter.heads.MarkovCorrection`).

    Attributes:
        looked_up: Of the table ``[vocab_size, rank]``: a draft takes a row of it for
            each token.
        read: Of the gate and of the matrix that makes biases of ``out_size`` tokens:
            a draft multiplies with all of them.
    """

    looked_up: int
    read: int


def markov_weights(
    rank: int, hidden_size: int, vocab_size: int, out_size: int
) -> MarkovWeights:
    """Count a Markov correction.

    Args:
        rank: Its rank.
        hidden_size: The target's.
        vocab_size: The target's vocabulary.
        out_size: The tokens that can be drafted.
    """
    return MarkovWeights(vocab_size * rank, (hidden_size + 1) * rank + rank * out_size)


@dataclass(frozen=True)
class DraftCost:
    """What a draft reads, beside the same figures of one target step.

    Attributes:
        drafter_parameters: Weights that the drafter brings (its checkpoint).
        looked_up_parameters: Those of them that are a table, of which a draft takes a
            few rows.
        position_parameters: Those that belong to one position each.
        shared_parameters: Weights of target layers that a forward of the drafter runs
            through.
        head_parameters: Weights of the target's LM head that it multiplies with; 0
            where the drafter has heads of its own.
        forwards: Of the drafter in a draft of all positions: one, or one for each
            position of a chain.
        target_parameters: Weights of one target forward, LM head included.
        kv_bytes_read_per_token: Cache read by one draft, per token of prefix
            (16-bit cache).
        target_kv_bytes_per_token: Cache that the target keeps, per token.
    """

    drafter_parameters: int
    looked_up_parameters: int
    position_parameters: int
    shared_parameters: int
    head_parameters: int
    forwards: int
    target_parameters: int
    kv_bytes_read_per_token: int
    target_kv_bytes_per_token: int

    @property
    def draft_parameters(self) -> int:
        """Weights that one draft of k tokens reads; those that each of several forwards
        reads count as often."""
        once = self.position_parameters
        own = self.drafter_parameters - self.looked_up_parameters - once
        each = own + self.shared_parameters + self.head_parameters
        return once + self.forwards * each

    @property
    def relative_weights(self) -> float:
        """Weights that a draft reads over those that a target step reads.

        No time: what a draft takes beside a target step is more where choosing tokens,
        launching kernels or reading the cache takes time. `vllm-mtp bench --profile`
        measures it.
        """
        return self.draft_parameters / self.target_parameters


def draft_cost(config: DrafterConfig) -> DraftCost:
    """Count what a draft reads."""
    facts = config.target
    all_layers = range(facts.num_hidden_layers)
    head = facts.vocab_size * facts.hidden_size
    out_size = config.num_draftable_tokens
    with torch.device("meta"):
        drafter = Drafter(config)
    forwards = config.num_speculative_tokens if config.chain else 1
    rank = config.markov.rank if config.markov else 0
    markov = markov_weights(rank, facts.hidden_size, facts.vocab_size, out_size)
    return DraftCost(
        drafter_parameters=sum(p.numel() for p in drafter.parameters()),
        looked_up_parameters=markov.looked_up,
        position_parameters=sum(
            drafter.get_parameter(name).numel()
            for name in drafter.weights_by_position()
        ),
        shared_parameters=sum(
            _layer_parameters(facts, i) for i in config.shared_layers
        ),
        head_parameters=(
            out_size * facts.hidden_size if config.lm_head == "target" else 0
        ),
        forwards=forwards,
        target_parameters=sum(_layer_parameters(facts, i) for i in all_layers) + head,
        kv_bytes_read_per_token=forwards
        * sum(_kv_bytes(facts, layer.target_layer) for layer in config.readers),
        target_kv_bytes_per_token=sum(
            _kv_bytes(facts, i) for i in facts.cached_layers or all_layers
        ),
    )


def _layer_parameters(facts: TargetFacts, index: int) -> int:
    """Weights of one target layer, as if it were dense and had attention."""
    sizes = [linear_sizes(facts.of_layer(index), name) for name in get_args(LinearName)]
    return sum(a * b for a, b in sizes) + 2 * facts.hidden_size


def _kv_bytes(facts: TargetFacts, index: int) -> int:
    """What one token takes in the cache of one layer, in 16 bits."""
    heads = facts.of_layer(index)
    return 2 * heads.num_key_value_heads * heads.head_dim * 2
