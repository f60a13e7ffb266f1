# SPDX-License-Identifier: Apache-2.0
"""`lay_out`, the whole of a draft's layout, against plain Python loops."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_mtp.drafter.layout import (
    PAD_SLOT,
    WINDOW_STEP,
    CacheTable,
    DraftInputs,
    DraftLayout,
    lay_out,
    most_read,
)

NULL_BLOCK = 0


@dataclass(frozen=True)
class Batch:
    """A runner's batch, as Python numbers."""

    prefix_lens: list[int]
    num_rejected: list[int] | None
    query_lens: list[int]  # rows of each request in the target's step
    tables: list[tuple[list[list[int]], int]]  # cache blocks of each row, block size
    num_draft_tokens: int
    max_model_len: int
    prefix_window: int | None

    def laid_out(self) -> DraftLayout:
        rejected = self.num_rejected or [0] * len(self.prefix_lens)
        lens = [n + r for n, r in zip(self.prefix_lens, rejected, strict=True)]
        ends = torch.tensor(self.query_lens).cumsum(0)
        inputs = DraftInputs(
            torch.tensor(lens, dtype=torch.int32),
            ends.to(torch.int32),
            None if self.num_rejected is None else torch.tensor(rejected),
            [
                CacheTable(torch.tensor(rows, dtype=torch.int32), size)
                for rows, size in self.tables
            ],
        )
        limits = self.num_draft_tokens, self.max_model_len, self.prefix_window
        return lay_out(inputs, *limits)

    @property
    def covered(self) -> int:
        """Tokens that every table has room for, up to the limit's own cache block;
        without a table, the limit."""
        needed = [-(-self.max_model_len // size) for _, size in self.tables]
        room = [
            min(len(rows[0]), blocks) * size
            for (rows, size), blocks in zip(self.tables, needed, strict=True)
        ]
        return min(room, default=self.max_model_len)


@st.composite
def batches(draw: st.DrawFn, windowed: bool = False) -> Batch:
    k = draw(st.integers(1, 6))
    sizes = st.sampled_from([16, 32, 64, 128] if windowed else [1, 2, 3, 5, 16])
    limit = draw(st.integers(1, 1500 if windowed else 40))
    num_reqs = draw(st.integers(1, 4))
    of_each = {"min_size": num_reqs, "max_size": num_reqs}
    prefix_lens = draw(st.lists(st.integers(1, limit), **of_each))
    rejected = draw(st.none() | st.lists(st.integers(0, 5), **of_each))
    rows = [
        draw(st.integers(1 + r, 9 + r)) for r in (rejected or [0] * len(prefix_lens))
    ]
    tables = []
    for size in draw(st.lists(sizes, max_size=3)):  # none where no cache is read
        # Some tables end with the longest sequence, others have room for its block.
        width = -(-limit // size) + draw(st.integers(0, 2))
        numbers = st.integers(NULL_BLOCK, 99)
        row = st.lists(numbers, min_size=width, max_size=width)
        tables.append((draw(st.lists(row, **of_each)), size))
    window = draw(st.integers(1, 700)) if windowed else None
    return Batch(prefix_lens, rejected, rows, tables, k, limit, window)


def windowed_tokens(prefix_len: int, window: int) -> list[int]:
    """Which tokens of a prefix are read, by the definition: whole pieces of
    `WINDOW_STEP`, of which the first and those with the last tokens."""
    first_needed = max(prefix_len - window, 0)
    pieces = range(0, prefix_len, WINDOW_STEP)
    read = [p for p in pieces if p == 0 or p + WINDOW_STEP > first_needed]
    return [t for p in read for t in range(p, min(p + WINDOW_STEP, prefix_len))]


@given(batches())
def test_prefixes_end_with_the_last_valid_token(batch: Batch) -> None:
    layout = batch.laid_out()
    assert layout.prefix_lens.tolist() == batch.prefix_lens
    rejected = batch.num_rejected or [0] * len(batch.prefix_lens)
    rows, start = [], 0
    for length, wrong in zip(batch.query_lens, rejected, strict=True):
        rows.append(start + length - 1 - wrong)
        start += length
    assert layout.boundary_rows.tolist() == rows
    assert layout.boundary_rows.dtype == torch.int64


@given(batches())
def test_rows_stand_behind_their_prefix_and_inside_the_limit(batch: Batch) -> None:
    layout, k = batch.laid_out(), batch.num_draft_tokens
    last = batch.max_model_len - 1
    assert layout.positions.dtype == torch.int64
    assert layout.positions.tolist() == [
        [min(p, last) for p in range(n, n + k)] for n in batch.prefix_lens
    ]
    expected = [min(n + k, batch.covered) for n in batch.prefix_lens]
    assert layout.seq_lens[:, -1].tolist() == expected
    assert max(expected) <= layout.most_read == batch.covered
    assert layout.seq_lens.tolist() == [  # each row's own, in a chain
        [min(p + 1, batch.covered) for p in range(n, n + k)] for n in batch.prefix_lens
    ]


@given(batches())
def test_slots_are_the_positions_own_or_none(batch: Batch) -> None:
    layout, k = batch.laid_out(), batch.num_draft_tokens
    assert len(layout.slots) == len(layout.read_tables) == len(batch.tables)
    for (rows, size), slots, read in zip(
        batch.tables, layout.slots, layout.read_tables, strict=True
    ):
        expected = []
        for row, n in zip(rows, batch.prefix_lens, strict=True):
            for position in range(n, n + k):
                column = position // size
                inside = position < batch.max_model_len and column < len(row)
                block = row[column] if inside else NULL_BLOCK
                slot = block * size + position % size
                expected.append(PAD_SLOT if block == NULL_BLOCK else slot)
        assert slots.dtype == torch.int64
        assert slots.tolist() == expected
        assert read.tolist() == rows  # without a window, the table as it is


@given(batches(windowed=True))
def test_a_window_leaves_whole_cache_blocks_out(batch: Batch) -> None:
    """Each table, read in its order, holds the window's tokens and then the block."""
    layout, k = batch.laid_out(), batch.num_draft_tokens
    assert batch.prefix_window is not None
    most = min(batch.covered, most_read(batch.prefix_window, k))
    assert layout.most_read == most
    for (rows, size), read in zip(batch.tables, layout.read_tables, strict=True):
        assert read.dtype == torch.int32
        assert read.shape[1] == min(len(rows[0]), -(-most // size))
        for row, cut, n, seq_len in zip(
            rows,
            read.tolist(),
            batch.prefix_lens,
            layout.seq_lens[:, -1].tolist(),
            strict=True,
        ):
            seen = windowed_tokens(n, batch.prefix_window)
            seen += range(n, min(n + k, batch.covered))
            assert seq_len == len(seen) <= most
            wanted = [row[token // size] for token in seen]
            assert [cut[at // size] for at in range(seq_len)] == wanted


@given(batches(windowed=True))
def test_rows_of_a_chain_leave_out_the_same(batch: Batch) -> None:
    layout, k = batch.laid_out(), batch.num_draft_tokens
    assert batch.prefix_window is not None
    assert layout.seq_lens.tolist() == [
        [
            len(windowed_tokens(n, batch.prefix_window))
            + len(range(n, min(p + 1, batch.covered)))
            for p in range(n, n + k)
        ]
        for n in batch.prefix_lens
    ]


@given(batches(windowed=True))
def test_a_window_moves_neither_positions_nor_slots(batch: Batch) -> None:
    values = vars(batch) | {"prefix_window": None}
    one, other = batch.laid_out(), Batch(**values).laid_out()
    assert one.positions.equal(other.positions)
    for slots, same in zip(one.slots, other.slots, strict=True):
        assert slots.equal(same)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_keep_the_runners_type(dtype: torch.dtype) -> None:
    """vLLM's kernels take the type that the runner has."""
    one: Any = torch.ones(1, dtype=dtype)
    table = CacheTable(torch.ones(1, 4, dtype=torch.int32), 16)
    layout = lay_out(DraftInputs(one * 20, one * 5, one, [table]), 1, 64, 16)
    assert layout.seq_lens.dtype == layout.prefix_lens.dtype == dtype
    assert layout.positions.tolist() == [[19]]  # k = 1: the anchor alone
    assert layout.seq_lens.tolist() == [[20]]
