# SPDX-License-Identifier: Apache-2.0
"""How long a training run and its data take, from sizes and stated assumptions.

Arithmetic only: floating-point operations over what a device is said to do of them, and
for the answers the bytes that a step of decoding reads over the device's bandwidth.
"""

from dataclasses import dataclass
from typing import get_args

import torch

from vllm_mtp.drafter.config import (
    DrafterConfig,
    LinearName,
    MLPLayerConfig,
    OwnLayerConfig,
)
from vllm_mtp.drafter.layers import OwnLayer
from vllm_mtp.drafter.lora import linear_sizes
from vllm_mtp.training.step_shape import StepShape, TargetSize

# Passes over the same matrix products: forward, and backward to the inputs, to the
# weights too where they are trained, and forward once more where it is recomputed.
_FROZEN, _TRAINED, _AGAIN = 2, 3, 1


@dataclass(frozen=True)
class Device:
    """What a device is said to do.

    Attributes:
        tflops: Of dense products in the type of training, 10^12 per second.
        utilisation: The part of that which training reaches.
        bandwidth: Of its memory, 10^9 bytes per second.
        memory: In bytes.
    """

    tflops: float
    utilisation: float
    bandwidth: float
    memory: float

    @property
    def flops(self) -> float:
        """Operations per second."""
        return self.tflops * 1e12 * self.utilisation


def encode_flops(target: TargetSize, tokens: float) -> float:
    """Operations of the target's forward over one text."""
    # Scores and sums of values, of a causal half.
    attention = 4 * target.attended * tokens**2 / 2
    return 2 * target.active_parameters * tokens + attention


def learn_flops(shape: StepShape) -> float:
    """Operations of the drafter's forward and backward over the blocks of one text,
    the scores of the target for them included."""
    config, facts = shape.config, shape.config.target
    rows = shape.blocks * shape.positions
    again = _AGAIN * shape.args.gradient_checkpointing
    total = 0.0
    for layer in config.layers:
        assert not isinstance(layer, MLPLayerConfig), "refused before"
        heads = facts.of_layer(layer.target_layer)
        width = heads.num_attention_heads * heads.head_dim
        # The whole prefix is scored, and what a row may not read is masked.
        attention = 4 * width * rows * (shape.tokens + shape.positions)
        total += attention * (_TRAINED + _AGAIN + again)
        if isinstance(layer, OwnLayerConfig):
            total += 2 * rows * own_parameters(layer, config) * (_TRAINED + again)
            continue
        sizes = [linear_sizes(heads, name) for name in get_args(LinearName)]
        total += 2 * rows * sum(a * b for a, b in sizes) * (_FROZEN + again)
        if layer.lora:
            pairs = [sum(linear_sizes(heads, name)) for name in layer.lora.modules]
            total += 2 * rows * layer.lora.rank * sum(pairs) * (_TRAINED + again)
    head = 2 * facts.hidden_size * shape.scored
    total += rows * head * _FROZEN
    if config.markov:
        total += 2 * rows * config.markov.rank * shape.scored * _TRAINED
    if shape.needs_teacher:
        total += min(rows, shape.tokens) * head
    if shape.args.unvisited_weight < 1:
        drafts = shape.blocks * (shape.positions + shape.is_exact)
        rank = config.markov.rank if config.markov else 0
        size = facts.hidden_size + rank
        total += 2 * drafts * size * config.num_draftable_tokens
    if shape.args.on_policy_weight:
        total += _span_flops(shape, rows)
    return total


def _span_flops(shape: StepShape, rows: int) -> float:
    """Operations of what the drafter drafts itself: chosen, read by the target and
    scored once more."""
    facts, target = shape.config.target, shape.target
    attention = 4 * target.attended * (shape.tokens + shape.positions)
    choices = 2 * 2 * facts.hidden_size * facts.vocab_size  # of both, over all tokens
    head = 2 * facts.hidden_size * shape.scored
    each = 2 * target.active_parameters + attention + choices + head * _FROZEN
    if shape.needs_teacher:
        each += head
    return rows * each


def own_parameters(layer: OwnLayerConfig, config: DrafterConfig) -> int:
    """Weights of an own layer."""
    with torch.device("meta"):
        return sum(p.numel() for p in OwnLayer(layer, config.target, 1).parameters())


def decoded_tokens_per_second(
    target: TargetSize, device: Device, context: float, most: int
) -> float:
    """Tokens per second of a device that answers many prompts at once.

    Each step reads the weights once and the cache of every request; requests are as
    many as the cache has room for.

    Args:
        target: Its weights.
        device: What it does.
        context: Tokens that a request has behind it, on average.
        most: Requests at once, at most.
    """
    weights = 2.0 * target.parameters  # in 16 bits
    cache = 2.0 * target.kv_heads * context
    room = 0.9 * device.memory - weights  # vLLM's gpu_memory_utilization is about that
    requests = max(min(most, room / cache), 1.0)
    seconds = (weights + requests * cache) / (device.bandwidth * 1e9 * _READS)
    return requests / seconds


# Part of the bandwidth that reading reaches; STREAM-like kernels get to 0.9 of it, and
# a step of decoding also computes, samples and schedules.
_READS = 0.6
