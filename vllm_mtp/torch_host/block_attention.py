# SPDX-License-Identifier: Apache-2.0
"""Attention of blocks over a stored prefix and over themselves, in plain torch.

Many blocks stand behind one sequence and do not see each other. Scores against
the prefix and against the own block are computed apart and share one softmax:
one dense mask over all rows would mostly score pairs that it then hides.

A few blocks attend at a time, and the backward computes their scores anew: scores take
rows times prefix, and kept for every layer they would be most of a training step's
memory. Where there are many it costs no time, since such a slice reads no further than
its own longest prefix, which saves half of the scores. A short text's are one slice,
whose scores a CPU keeps: to compute them twice took half of the time of attention.

Dimensions: H query heads, G KV heads, D head size, T prefix tokens, B blocks,
k positions, R = B * k rows.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from vllm_mtp.drafter.layout import block_reads_itself, reads_prefix
from vllm_mtp.torch_host.at_once import is_cpu

# Scores of a slice. On a CPU they should stay in its cache; a GPU wants large products.
_CPU_SCORES, GPU_SCORES = 2**21, 2**26
# Scores of a text, and of a layer, that are kept for the backward.
_CPU_KEPT_SCORES = 2**22


class BlockSlice(NamedTuple):
    """Blocks that attend together, and what each of their rows may read."""

    rows: slice  # of all queries
    own_rows: slice  # of all keys of blocks
    tokens: slice  # all of the prefix that some row reads
    prefix: torch.Tensor  # [rows, tokens] bool
    block: torch.Tensor  # [queries of a block, keys of a block] bool

    def of_position(self, position: int) -> "BlockSlice":
        """The same blocks, when they have come to one of their positions."""
        num_rows, num_keys = self.block.shape
        blocks = slice(self.rows.start // num_rows, self.rows.stop // num_rows)
        known = position + 1
        return BlockSlice(
            blocks,
            slice(blocks.start * known, blocks.stop * known),
            self.tokens,
            self.prefix.unflatten(0, (-1, num_rows))[:, position],
            self.block[position:known, :known],
        )


class Scoring(NamedTuple):
    """How a layer's attention makes weights of queries and keys."""

    scale: float  # factor of the scores
    sinks: torch.Tensor | None = None  # [H]; scores of a key each, whose value is zero
    soft_cap: float | None = None  # bound of the scores, by tanh


def block_slices(
    prefix_lens: torch.Tensor,
    num_draft_tokens: int,
    num_heads: int,
    window: int | None = None,
    prefix_window: int | None = None,
    *,
    causal: bool = True,
) -> list[BlockSlice]:
    """Cut the blocks behind one sequence into slices of bounded memory.

    Args:
        prefix_lens: ``[B]`` int64; n of each block.
        num_draft_tokens: k.
        num_heads: H.
        window: Tokens that a row reads at most, itself included; None for all.
        prefix_window: As in `layout.skipped_tokens`; None for all.
        causal: Whether a row reads only rows of its block that stand before it.
    """
    most = _CPU_SCORES if is_cpu(prefix_lens.device) else GPU_SCORES
    device = prefix_lens.device
    block = block_reads_itself(num_draft_tokens, device, window, causal=causal)
    slices = []
    lens = prefix_lens.cpu().tolist()
    for start, end in _cuts(lens, most // (num_draft_tokens * num_heads)):
        # Of a window of its own, a layer reads nothing before the window.
        first = 0 if window is None else max(min(lens[start:end]) - window + 1, 0)
        tokens = slice(first, max(lens[start:end]))
        prefix = reads_prefix(
            prefix_lens[start:end],
            tokens.stop,
            num_draft_tokens,
            window,
            prefix_window,
        )
        rows = slice(start * num_draft_tokens, end * num_draft_tokens)
        prefix = prefix[..., tokens].flatten(0, 1)
        slices.append(BlockSlice(rows, rows, tokens, prefix, block))
    return slices


def _cuts(prefix_lens: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Starts and ends of slices of at most so many blocks times their longest prefix,
    or of one block."""
    start = longest = 0
    for index, length in enumerate(prefix_lens):
        longest = max(longest, length)
        if index > start and (index - start + 1) * longest > most:
            yield start, index
            start, longest = index, length
    yield start, len(prefix_lens)


def attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    slices: Sequence[BlockSlice],
    scoring: Scoring,
) -> torch.Tensor:
    """Attend to the prefix and to the own block.

    Args:
        query: ``[H, R, D]``, RoPE applied.
        key: ``[G, R', D]``, RoPE applied; the rows that the blocks have so far.
        value: ``[G, R', D]``.
        prefix_key: ``[G, T', D]`` with T' >= T, as the target cached it.
        prefix_value: ``[G, T', D]``.
        slices: From `block_slices`.
        scoring: Of the layer.

    Returns:
        ``[R, H * D]``.
    """
    num_scores = query.shape[0] * sum(part.prefix.numel() for part in slices)
    keeps = is_cpu(query.device) and num_scores <= _CPU_KEPT_SCORES
    outs = []
    for part in slices:
        own = [x[:, part.own_rows] for x in (key, value)]
        rows = query[:, part.rows]
        inputs: Any = (rows, *own, prefix_key, prefix_value, part, scoring)
        if torch.is_grad_enabled() and not keeps:
            out = checkpoint(
                _attend, *inputs, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out = _attend(*inputs)
        outs.append(out)
    return torch.cat(outs)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    part: BlockSlice,
    scoring: Scoring,
) -> torch.Tensor:
    (num_rows, num_read), (per_block, num_own) = part.prefix.shape, part.block.shape
    query = (query * scoring.scale).unflatten(0, (key.shape[0], -1))  # [G, H/G, R, D]
    prefix_key = prefix_key[:, part.tokens].to(query.dtype)
    prefix_value = prefix_value[:, part.tokens].to(query.dtype)
    # The heads of a group share their keys, so their rows go through one product.
    past = (query.flatten(1, 2) @ prefix_key.mT).unflatten(1, (-1, num_rows))
    own_key, own_value = (
        rows[:, None].unflatten(-2, (-1, num_own)) for rows in (key, value)
    )
    blocks = (-1, per_block)
    own = query.unflatten(-2, blocks) @ own_key.mT  # [G, H/G, B, queries, keys]
    if (cap := scoring.soft_cap) is not None:
        past, own = torch.tanh(past / cap) * cap, torch.tanh(own / cap) * cap
    past = past.masked_fill(~part.prefix, float("-inf"))
    own = own.masked_fill(~part.block, float("-inf"))
    scores = torch.cat([past, own.flatten(2, 3)], dim=-1)
    if scoring.sinks is not None:
        sinks = scoring.sinks.to(scores.dtype).unflatten(0, scores.shape[:2])
        column = sinks[..., None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.float().softmax(-1).to(query.dtype)
    weights = weights[..., : num_read + num_own]
    past_weights, own_weights = weights.split([num_read, num_own], dim=-1)
    out = (past_weights.flatten(1, 2) @ prefix_value).unflatten(1, (-1, num_rows))
    out = out + (own_weights.unflatten(-2, blocks) @ own_value).flatten(2, 3)
    return out.permute(2, 0, 1, 3).flatten(1)
