# SPDX-License-Identifier: Apache-2.0
"""The block layout: the maths of positions, slots, rows, masks and labels.

A block is the row ``[anchor, P1 .. P(k-1)]`` that the drafter puts behind a
prefix of n tokens. Everything here is pure tensor maths, used by training,
evaluation and serving alike, and works on any device without a sync.

Dimensions: B blocks, k positions per block, T prefix tokens; the rows of several
blocks are flattened block by block, so row ``b * k + i`` is position i of block b.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from vllm_mtp.errors import MTPError

PAD_SLOT = -1
"""Slot of a row that must not be written (vLLM's ``PADDING_SLOT_ID``)."""

IGNORE_LABEL = -100
"""Label of a position without a true token (PyTorch's ``ignore_index``)."""


def block_positions(prefix_lens: torch.Tensor, num_draft_tokens: int) -> torch.Tensor:
    """Positions of every row.

    Args:
        prefix_lens: ``[B]`` integer; n of each block, so the anchor stands at n.
        num_draft_tokens: k.

    Returns:
        ``[B, k]``, same dtype and device.
    """
    positions = torch.arange(
        num_draft_tokens, device=prefix_lens.device, dtype=prefix_lens.dtype
    )
    return prefix_lens[:, None] + positions


WINDOW_STEP = 128
"""A window on the prefix moves on by so many tokens at a time, and the first so many
are always read. These are whole cache blocks, of any size that divides it, and a table
without those in between is all that an attention kernel needs."""


def skipped_tokens(prefix_lens: torch.Tensor, prefix_window: int) -> torch.Tensor:
    """How many tokens a block does not read, behind the first `WINDOW_STEP`.

    The first tokens take up much attention whatever they say ("attention sinks",
    StreamingLLM, 2309.17453), so without them the drafts get worse.

    Args:
        prefix_lens: ``[B]`` integer; n of each block.
        prefix_window: At least so many of the last tokens are read, and up to
            `WINDOW_STEP` - 1 more.

    Returns:
        ``[B]``, multiples of `WINDOW_STEP`.
    """
    begin = (prefix_lens - prefix_window) // WINDOW_STEP * WINDOW_STEP
    return (begin - WINDOW_STEP).clamp(min=0)


def first_to_skip(prefix_window: int) -> int:
    """The shortest prefix of which something is skipped."""
    return (-(-prefix_window // WINDOW_STEP) + 2) * WINDOW_STEP


def most_read(prefix_window: int, num_draft_tokens: int) -> int:
    """Most tokens that a block reads, its own included."""
    return prefix_window + 2 * WINDOW_STEP - 1 + num_draft_tokens


def require_whole_blocks(block_sizes: Iterable[int]) -> None:
    """Raise unless a window can be cut out of block tables.

    Raises:
        MTPError: Names the size that does not divide `WINDOW_STEP`.
    """
    for size in block_sizes:
        if WINDOW_STEP % size:
            raise MTPError(
                f"block_size: the cache has blocks of {size} tokens, and a drafter "
                f"with a prefix_window needs a size that divides {WINDOW_STEP}; start "
                "with --block-size 16, 32, 64 or 128, or set prefix_window to null in "
                "the drafter's config.json"
            )


def table_without(
    block_table: torch.Tensor, block_size: int, skipped: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """A block table without the blocks of skipped tokens.

    Args:
        block_table: ``[B, M]`` integer.
        block_size: Tokens per cache block; divides `WINDOW_STEP`.
        skipped: ``[B]``, from `skipped_tokens`.
        num_tokens: Most that a block reads.

    Returns:
        ``[B, min(M, blocks of num_tokens)]``, same dtype. Positions in it are those of
        the sequence, less what is skipped before them.
    """
    last = block_table.shape[1] - 1
    column = torch.arange(
        min(last + 1, -(-num_tokens // block_size)), device=block_table.device
    )
    is_behind = column >= WINDOW_STEP // block_size
    column = column + is_behind * (skipped // block_size).long()[:, None]
    return block_table.gather(1, column.clamp(max=last))


class CacheTable(NamedTuple):
    """Where the layers of one KV-cache group keep the tokens of B requests."""

    # [B, M] integer; 0, the null block, where a token has left a sliding window. Behind
    # a request's last block it is nobody's business what stands there.
    cache_blocks: torch.Tensor
    block_size: int  # tokens per cache block


class DraftInputs(NamedTuple):
    """What a runner knows of B requests when the target's step is over.

    The step may have verified drafts. Lengths and rows still count the rejected ones.
    """

    seq_lens: torch.Tensor  # [B] integer; tokens of each request, in the cache
    query_ends: torch.Tensor  # [B] integer; the step's row behind each request's last
    num_rejected: torch.Tensor | None  # [B] integer; None where none was verified
    tables: Sequence[CacheTable]  # of each KV-cache group that the drafter reads
    # [B] integer; what M-RoPE adds to the positions behind a prompt with images. None
    # for ordinary RoPE.
    rope_deltas: torch.Tensor | None = None


class DraftLayout(NamedTuple):
    """All that B blocks of k rows need to run on a paged cache.

    The rows of a block run at once, or as a chain: one after the other.
    """

    prefix_lens: torch.Tensor  # [B]; n of each block, as in `DraftInputs.seq_lens`
    boundary_rows: torch.Tensor  # [B] int64; the step's row of token n - 1
    positions: torch.Tensor  # [B, k] int64, inside the RoPE table
    # [B, k]; tokens that are read by the time that row i runs, row i's own included
    seq_lens: torch.Tensor
    slots: tuple[torch.Tensor, ...]  # by table, [B * k] int64; `PAD_SLOT` for none
    read_tables: tuple[torch.Tensor, ...]  # by table, [B, M'], windows cut out
    most_read: int  # bound of ``seq_lens`` that is known without a look at them
    # [B, k] int64; text has the same position on all axes of M-RoPE
    rope_positions: torch.Tensor


def lay_out(
    inputs: DraftInputs,
    num_draft_tokens: int,
    max_model_len: int,
    prefix_window: int | None = None,
) -> DraftLayout:
    """Put a block behind the valid tokens of every request.

    Rows beyond ``max_model_len`` have no slot and draft nothing of use, but must
    not leave the RoPE table or the block table. Where ``seq_lens`` is cut to what a
    block table covers, all rows of that block read a little less of the prefix
    (attention aligns the rows with the sequence's end): these last few drafts may be
    worse, never wrong. A chain's rows each end at their own token, up to the limit.

    A drafter that reads no cache has no tables, and needs positions alone.

    Args:
        inputs: The batch.
        num_draft_tokens: k.
        max_model_len: Most tokens of a sequence.
        prefix_window: As in `skipped_tokens`; None to read all.
    """
    prefix_lens, ends = inputs.seq_lens, inputs.query_ends
    if inputs.num_rejected is not None:
        prefix_lens = prefix_lens - inputs.num_rejected
        ends = ends - inputs.num_rejected
    tables = inputs.tables
    most = covered_tokens(tables, max_model_len)
    seq_lens = block_positions(prefix_lens, num_draft_tokens) + 1
    seq_lens = seq_lens.clamp(max=most)
    read_tables = tuple(table.cache_blocks for table in tables)
    if prefix_window is not None:
        skipped = skipped_tokens(prefix_lens, prefix_window)
        seq_lens = seq_lens - skipped[:, None]
        most = min(most, most_read(prefix_window, num_draft_tokens))
        read_tables = tuple(table_without(*table, skipped, most) for table in tables)
    positions = block_positions(prefix_lens.long(), num_draft_tokens)
    beyond = positions >= max_model_len
    positions = positions.clamp(max=max_model_len - 1)
    slots = tuple(
        slots_of_positions(positions, *table).masked_fill(beyond, PAD_SLOT).flatten()
        for table in tables
    )
    rope_positions = positions
    if inputs.rope_deltas is not None:
        rope_positions = (positions + inputs.rope_deltas[:, None]).clamp(min=0)
    return DraftLayout(
        prefix_lens,
        (ends - 1).long(),
        positions,
        seq_lens,
        slots,
        read_tables,
        most,
        rope_positions,
    )


def covered_tokens(tables: Iterable[CacheTable], max_model_len: int) -> int:
    """Tokens of a sequence that every table has room for: whole cache blocks, up to
    the one with the limit; the limit itself, where there is no table.

    A table may be wider, but backends size their buffers by the limit.
    """
    covered = (
        min(table.cache_blocks.shape[1], -(-max_model_len // table.block_size))
        * table.block_size
        for table in tables
    )
    return min(covered, default=max_model_len)


def is_placeholder(
    num_rows: int, num_draft_tokens: int, device: torch.device | str
) -> torch.Tensor:
    """Which flattened rows are placeholders (all but each block's anchor).

    Returns:
        ``[num_rows]`` bool.
    """
    return torch.arange(num_rows, device=device) % num_draft_tokens != 0


def slots_of_positions(
    positions: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    """Scratch slots of the paged cache for the given positions.

    Args:
        positions: ``[B, k]`` integer.
        block_table: ``[B, M]`` integer; cache block of each logical block.
        block_size: Tokens per cache block.

    Returns:
        ``[B, k]`` int64; ``PAD_SLOT`` where a position lies beyond the table or in
        the null block (id 0), which belongs to nobody.
    """
    logical = (positions // block_size).long()
    last = block_table.shape[1] - 1
    block_ids = block_table.gather(1, logical.clamp(max=last)).long()
    slots = block_ids * block_size + positions % block_size
    unusable = (logical > last) | (block_ids == 0)
    return slots.masked_fill(unusable, PAD_SLOT)


def anchors_of(span: tuple[int, int], most: int | None = None) -> range:
    """Tokens of an answer from which decoding drafts on.

    Args:
        span: [start, end) of the answer.
        most: Only this many of the first.

    Returns:
        From ``start``, or from 1 where nothing stands before the answer (a draft
        reads a prefix), to ``end - 2``, whose next token is the answer's last.
    """
    start, stop = max(span[0], 1), span[1] - 1
    return range(start, stop if most is None else min(stop, start + most))


def possible_anchors(spans: Sequence[Sequence[int]], num_tokens: int) -> torch.Tensor:
    """Every position of a text where a block has something to learn.

    The anchor is one of the target's own tokens, and so is the token behind it.

    Args:
        spans: ``[start, end)`` of the target's own tokens.
        num_tokens: T; what lies behind is cut off.

    Returns:
        ``[A]`` int64, ascending; a block needs a prefix of at least one token.
    """
    usable = (anchors_of((start, min(end, num_tokens))) for start, end in spans)
    return torch.tensor([n for span in usable for n in span], dtype=torch.int64)


def span_ends(
    anchors: torch.Tensor, spans: Sequence[Sequence[int]], num_tokens: int
) -> torch.Tensor:
    """Where the span that each anchor lies in ends. ``[A]`` int64."""
    ends = torch.zeros_like(anchors)
    for start, end in spans:
        ends[(anchors >= start) & (anchors < end)] = min(end, num_tokens)
    return ends


def block_labels(
    token_ids: torch.Tensor, prefix_lens: torch.Tensor, num_draft_tokens: int
) -> torch.Tensor:
    """True next token of every row.

    Row i of a block behind n tokens predicts token n + 1 + i.

    Args:
        token_ids: ``[T]`` int64; one sequence.
        prefix_lens: ``[B]`` int64; n of each block, 0 <= n < T.
        num_draft_tokens: k.

    Returns:
        ``[B, k]`` int64; ``IGNORE_LABEL`` beyond the sequence's end.
    """
    wanted = block_positions(prefix_lens, num_draft_tokens) + 1
    labels = token_ids[wanted.clamp(max=token_ids.shape[0] - 1)]
    return labels.masked_fill(wanted >= token_ids.shape[0], IGNORE_LABEL)


def reads_prefix(
    prefix_lens: torch.Tensor,
    num_prefix_tokens: int,
    num_draft_tokens: int = 1,
    window: int | None = None,
    prefix_window: int | None = None,
) -> torch.Tensor:
    """Which prefix tokens each row reads, when many blocks stand behind one sequence.

    Args:
        prefix_lens: ``[B]`` integer; n of each block.
        num_prefix_tokens: T.
        num_draft_tokens: k.
        window: Tokens that a row reads at most, itself included; None for all.
        prefix_window: As in `skipped_tokens`; None for all.

    Returns:
        ``[B, k, T]`` bool.
    """
    token = torch.arange(num_prefix_tokens, device=prefix_lens.device)
    readable = token < prefix_lens[:, None]
    if prefix_window is not None:
        resumes = WINDOW_STEP + skipped_tokens(prefix_lens, prefix_window)
        readable &= (token < WINDOW_STEP) | (token >= resumes[:, None])
    readable = readable[:, None].expand(-1, num_draft_tokens, -1)
    if window is None:
        return readable
    rows = block_positions(prefix_lens, num_draft_tokens)[..., None]
    return readable & (token > rows - window)


def block_reads_itself(
    num_draft_tokens: int,
    device: torch.device | str,
    window: int | None = None,
    *,
    causal: bool = True,
) -> torch.Tensor:
    """Which positions of its own block each position reads: none behind it, if causal.

    Returns:
        ``[k, k]`` bool; row i is what position i reads.
    """
    readable = torch.ones(
        num_draft_tokens, num_draft_tokens, dtype=torch.bool, device=device
    )
    if window is not None:
        readable = readable.triu(1 - window)
    return readable.tril() if causal else readable
