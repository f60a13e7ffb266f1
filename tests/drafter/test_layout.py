# SPDX-License-Identifier: Apache-2.0
"""The block layout against plain Python loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_mtp.drafter.layout import (
    IGNORE_LABEL,
    PAD_SLOT,
    WINDOW_STEP,
    block_labels,
    block_positions,
    block_reads_itself,
    is_placeholder,
    most_read,
    reads_prefix,
    require_whole_blocks,
    slots_of_positions,
)
from vllm_mtp.errors import MTPError

DRAFT_LENGTHS = st.integers(1, 6)
PREFIX_LENS = st.lists(st.integers(0, 12), min_size=1, max_size=5)


@given(PREFIX_LENS, DRAFT_LENGTHS, st.sampled_from([torch.int32, torch.int64]))
def test_positions_count_up_from_the_anchor(
    prefix_lens: list[int], num_draft_tokens: int, dtype: torch.dtype
) -> None:
    positions = block_positions(
        torch.tensor(prefix_lens, dtype=dtype), num_draft_tokens
    )
    assert positions.dtype == dtype
    assert positions.tolist() == [
        [n + i for i in range(num_draft_tokens)] for n in prefix_lens
    ]


@given(st.integers(1, 5), DRAFT_LENGTHS)
def test_every_row_but_the_first_of_a_block_is_a_placeholder(
    num_blocks: int, num_draft_tokens: int
) -> None:
    rows = is_placeholder(num_blocks * num_draft_tokens, num_draft_tokens, "cpu")
    assert rows.dtype == torch.bool
    assert rows.tolist() == [
        i > 0 for _ in range(num_blocks) for i in range(num_draft_tokens)
    ]


@st.composite
def paged_caches(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Block tables (0 is the null block) and the block size."""
    block_size, num_columns = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    row = st.lists(st.integers(0, 9), min_size=num_columns, max_size=num_columns)
    return draw(st.lists(row, min_size=1, max_size=3)), block_size


@given(paged_caches(), st.data())
def test_slots_lie_in_the_blocks_of_the_table(
    cache: tuple[list[list[int]], int], data: st.DataObject
) -> None:
    tables, block_size = cache
    num_draft_tokens = data.draw(DRAFT_LENGTHS)
    # Up to beyond the end of the table.
    position = st.integers(0, block_size * len(tables[0]) + 3)
    row = st.lists(position, min_size=num_draft_tokens, max_size=num_draft_tokens)
    positions = data.draw(st.lists(row, min_size=len(tables), max_size=len(tables)))

    def slot(table: list[int], position: int) -> int:
        column = position // block_size
        if column >= len(table) or table[column] == 0:
            return PAD_SLOT
        return table[column] * block_size + position % block_size

    slots = slots_of_positions(
        torch.tensor(positions),
        torch.tensor(tables, dtype=torch.int32),  # as vLLM keeps them
        block_size,
    )
    assert slots.dtype == torch.int64
    assert slots.tolist() == [
        [slot(table, position) for position in line]
        for table, line in zip(tables, positions, strict=True)
    ]


@given(st.lists(st.integers(0, 99), min_size=1, max_size=12), DRAFT_LENGTHS, st.data())
def test_labels_are_the_tokens_after_each_row(
    tokens: list[int], num_draft_tokens: int, data: st.DataObject
) -> None:
    prefix_lens = data.draw(
        st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=5)
    )
    labels = block_labels(
        torch.tensor(tokens), torch.tensor(prefix_lens), num_draft_tokens
    )
    padded = tokens + [IGNORE_LABEL] * (num_draft_tokens + 1)
    assert labels.tolist() == [
        [padded[n + 1 + i] for i in range(num_draft_tokens)] for n in prefix_lens
    ]


def test_ignored_labels_are_the_ones_that_pytorch_ignores() -> None:
    labels = block_labels(torch.tensor([7, 8]), torch.tensor([0]), 3)[0]
    loss = torch.nn.functional.cross_entropy(
        torch.zeros(3, 16), labels, reduction="none"
    )
    assert (loss == 0).tolist() == [False, True, True]


@given(PREFIX_LENS, st.integers(0, 3))
def test_a_block_reads_its_prefix(prefix_lens: list[int], num_more: int) -> None:
    mask = reads_prefix(torch.tensor(prefix_lens), max(prefix_lens) + num_more)
    assert mask.dtype == torch.bool
    assert mask.shape == (len(prefix_lens), 1, max(prefix_lens) + num_more)
    for row, prefix_len in zip(mask[:, 0], prefix_lens, strict=True):
        assert row.nonzero().flatten().tolist() == list(range(prefix_len))


@given(DRAFT_LENGTHS)
def test_a_position_reads_its_block(num_draft_tokens: int) -> None:
    causal = block_reads_itself(num_draft_tokens, "cpu")
    for position, row in enumerate(causal):
        assert row.nonzero().flatten().tolist() == list(range(position + 1))


def windowed(prefix_len: int, prefix_window: int) -> list[int]:
    """The prefix's tokens that a windowed block reads, piece by piece."""
    pieces = range(0, prefix_len, WINDOW_STEP)
    read = [
        piece
        for piece in pieces
        if piece == 0 or piece + WINDOW_STEP > prefix_len - prefix_window
    ]
    return [
        token
        for piece in read
        for token in range(piece, min(piece + WINDOW_STEP, prefix_len))
    ]


LONG_PREFIXES = st.lists(st.integers(0, 1500), min_size=1, max_size=4)


@given(LONG_PREFIXES, DRAFT_LENGTHS, st.integers(1, 700))
def test_a_windowed_block_reads_the_first_and_the_last_pieces(
    prefix_lens: list[int], num_draft_tokens: int, prefix_window: int
) -> None:
    lens = torch.tensor(prefix_lens)
    mask = reads_prefix(lens, 1500, num_draft_tokens, prefix_window=prefix_window)
    for prefix_len, rows in zip(prefix_lens, mask, strict=True):
        expected = windowed(prefix_len, prefix_window)
        assert all(row.nonzero().flatten().tolist() == expected for row in rows)
        assert len(expected) >= min(prefix_len, prefix_window)
        assert len(expected) + num_draft_tokens <= most_read(
            prefix_window, num_draft_tokens
        )


def test_a_window_needs_whole_cache_blocks() -> None:
    require_whole_blocks([16, 128])
    with pytest.raises(MTPError, match="block_size: the cache has blocks of 48 tokens"):
        require_whole_blocks([16, 48])


@given(PREFIX_LENS, DRAFT_LENGTHS, st.integers(1, 9))
def test_a_row_reads_its_window(
    prefix_lens: list[int], num_draft_tokens: int, window: int
) -> None:
    lens = torch.tensor(prefix_lens)
    prefix = reads_prefix(lens, max(prefix_lens), num_draft_tokens, window)
    block = block_reads_itself(num_draft_tokens, "cpu", window)
    for prefix_len, rows in zip(prefix_lens, prefix, strict=True):
        for position, (before, inside) in enumerate(zip(rows, block, strict=True)):
            read = before.nonzero().flatten().tolist()
            read += (inside.nonzero().flatten() + prefix_len).tolist()
            last = prefix_len + position
            assert read == list(range(max(0, last - window + 1), last + 1))
