# SPDX-License-Identifier: Apache-2.0
"""The attention of `block_attention` by torch's FlexAttention: scores in no memory.

One kernel for all blocks, where slices need several products each. On a CPU it has no
backward, so there it serves for comparison alone; on CUDA it is compiled on first use.

Dimensions as in `block_attention`.
"""

from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    flex_attention,
)

from vllm_mtp.drafter.layout import block_reads_itself, reads_prefix
from vllm_mtp.torch_host.block_attention import Scoring


def flex_mask(
    prefix_lens: torch.Tensor,
    num_draft_tokens: int,
    window: int | None = None,
    prefix_window: int | None = None,
) -> BlockMask:
    """What the rows of the blocks behind one sequence read: T prefix tokens, T being
    the longest prefix, and behind them the R rows themselves.

    Args:
        prefix_lens: ``[B]`` int64; n of each block.
        num_draft_tokens: k.
        window: Tokens that a row reads at most, itself included; None for all.
        prefix_window: As in `layout.skipped_tokens`; None for all.
    """
    longest, k = int(prefix_lens.max()), num_draft_tokens
    prefix = reads_prefix(prefix_lens, longest, k, window, prefix_window).flatten(0, 1)
    block = block_reads_itself(k, prefix_lens.device, window)

    def reads(_: Any, __: Any, row: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        own = token - longest
        itself = (own >= 0) & (own // k == row // k) & block[row % k, own % k]
        past = (token < longest) & prefix[row, token.clamp(max=longest - 1)]
        return itself | past

    rows = len(prefix)
    return create_block_mask(
        reads, None, None, rows, longest + rows, device=prefix.device
    )


def attend_blocks_by_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    mask: BlockMask,
    scoring: Scoring,
) -> torch.Tensor:
    """As `block_attention.attend_blocks`, with a mask of `flex_mask`."""
    num_read = mask.seq_lengths[1] - query.shape[1]
    keys, values = (
        torch.cat([past[:, :num_read].to(query.dtype), own.to(query.dtype)], dim=1)
        for past, own in ((prefix_key, key), (prefix_value, value))
    )
    cap = scoring.soft_cap

    def capped(score: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.tanh(score / cap) * cap  # type: ignore[operator]

    attend = flex_attention if query.device.type == "cpu" else _compiled()
    found: Any = attend(
        query[None],
        keys[None],
        values[None],
        score_mod=None if cap is None else capped,
        block_mask=mask,
        scale=scoring.scale,
        enable_gqa=True,
        return_lse=scoring.sinks is not None,
    )
    if scoring.sinks is not None:
        found, normaliser = found
        # A sink is one more key whose value is zero: it takes its share of all weights.
        share = torch.sigmoid(normaliser - scoring.sinks[None, :, None])
        found = found * share[..., None].to(found.dtype)
    return found[0].transpose(0, 1).flatten(1)


@cache
def _compiled(backend: str = "inductor", most_kinds: int = 128) -> Any:
    # Where torch gives up on compiling, it attends by plain products and keeps all
    # scores: fullgraph makes that an error. It gives up after 8 kinds of input, and
    # texts of all lengths, with and without gradients, come to about 16 for each
    # kind of layer. (torch.compile's own argument for this is not in every torch.)
    with_more_kinds = torch._dynamo.config.patch(recompile_limit=most_kinds)
    return with_more_kinds(
        torch.compile(flex_attention, backend=backend, fullgraph=True)
    )
