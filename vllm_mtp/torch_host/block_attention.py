# SPDX-License-Identifier: Apache-2.0
"""Attention of blocks over a stored prefix and over themselves, in plain torch.

Many blocks stand behind one sequence and do not see each other. Scores against
the prefix and against the own block are computed apart and share one softmax:
one dense mask over all rows would mostly score pairs that it then hides.

Dimensions: H query heads, G KV heads, D head size, T prefix tokens, B blocks,
k positions, R = B * k rows.
"""

from typing import NamedTuple

import torch

from vllm_mtp.drafter.layout import block_reads_itself, reads_prefix


class BlockBias(NamedTuple):
    """What each row may read, as numbers added to its scores: 0 or minus infinity."""

    prefix: torch.Tensor  # [R, T]
    block: torch.Tensor  # [k, k]

    @property
    def num_draft_tokens(self) -> int:
        return self.block.shape[0]


class Scoring(NamedTuple):
    """How a layer's attention makes weights of queries and keys."""

    scale: float  # factor of the scores
    sinks: torch.Tensor | None = None  # [H]; scores of a key each, whose value is zero
    soft_cap: float | None = None  # bound of the scores, by tanh


def block_bias(
    prefix_lens: torch.Tensor,
    num_draft_tokens: int,
    window: int | None = None,
    prefix_window: int | None = None,
) -> BlockBias:
    """The bias for the blocks behind one sequence.

    Args:
        prefix_lens: ``[B]`` int64; n of each block. T is the largest of them.
        num_draft_tokens: k.
        window: Tokens that a row reads at most, itself included; None for all.
        prefix_window: As in `layout.skipped_tokens`; None for all.
    """
    longest = int(prefix_lens.max())
    prefix = reads_prefix(prefix_lens, longest, num_draft_tokens, window, prefix_window)
    block = block_reads_itself(num_draft_tokens, prefix_lens.device, window)
    return BlockBias(_as_bias(prefix.flatten(0, 1)), _as_bias(block))


def _as_bias(readable: torch.Tensor) -> torch.Tensor:
    zeros = torch.zeros(readable.shape, device=readable.device)
    return zeros.masked_fill_(~readable, float("-inf"))


def attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    bias: BlockBias,
    scoring: Scoring,
) -> torch.Tensor:
    """Attend to the prefix and to the own block.

    Args:
        query: ``[H, R, D]``, RoPE applied.
        key: ``[G, R, D]``, RoPE applied.
        value: ``[G, R, D]``.
        prefix_key: ``[G, T', D]`` with T' >= T, as the target cached it.
        prefix_value: ``[G, T', D]``.
        bias: From `block_bias`.
        scoring: Of the layer.

    Returns:
        ``[R, H * D]``.
    """
    (num_rows, num_read), num_draft_tokens = bias.prefix.shape, bias.num_draft_tokens
    query = (query * scoring.scale).unflatten(0, (key.shape[0], -1))  # [G, H/G, R, D]
    prefix_key = prefix_key[:, :num_read].to(query.dtype)
    prefix_value = prefix_value[:, :num_read].to(query.dtype)
    # The heads of a group share their keys, so their rows go through one product.
    past = (query.flatten(1, 2) @ prefix_key.mT).unflatten(1, (-1, num_rows))
    blocks = (-1, num_draft_tokens)
    own_query, own_key, own_value = (
        rows.unflatten(-2, blocks) for rows in (query, key[:, None], value[:, None])
    )
    own = own_query @ own_key.mT  # [G, H/G, B, k, k]
    if (cap := scoring.soft_cap) is not None:
        past, own = torch.tanh(past / cap) * cap, torch.tanh(own / cap) * cap
    own = own + bias.block
    scores = torch.cat([past + bias.prefix, own.flatten(2, 3)], dim=-1)
    if scoring.sinks is not None:
        sinks = scoring.sinks.to(scores.dtype).unflatten(0, scores.shape[:2])
        column = sinks[..., None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.float().softmax(-1).to(query.dtype)
    weights = weights[..., : num_read + num_draft_tokens]
    past_weights, own_weights = weights.split([num_read, num_draft_tokens], dim=-1)
    out = (past_weights.flatten(1, 2) @ prefix_value).unflatten(1, (-1, num_rows))
    out = out + (own_weights.unflatten(-2, blocks) @ own_value).flatten(2, 3)
    return out.permute(2, 0, 1, 3).flatten(1)
