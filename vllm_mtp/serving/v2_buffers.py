# SPDX-License-Identifier: Apache-2.0
"""What the forwards of a draft on the V2 runner read, always at the same addresses.

A block runs in one forward of k rows, a chain in k forwards of one row. Either way
everything of a step is here before the first forward, so that one CUDA graph can hold
all of them.

Dimensions: F forwards, R rows of each request in one (F * R = k), G KV-cache groups, N
requests at most, B requests of the step.
"""

from collections.abc import Sequence

import torch

from vllm_mtp.drafter.layout import PAD_SLOT, DraftLayout


class DraftBuffers:
    """Positions, lengths and slots of all forwards.

    Args:
        num_forwards: F.
        num_rows: R.
        num_groups: G; 0 while there is no cache.
        max_num_reqs: N.
        device: Where the target is.
        has_rope_deltas: Whether RoPE takes other positions than the cache (M-RoPE).

    Attributes:
        starts: ``[N + 1]`` int32; first row of each request, in every forward.
        seq_lens: ``[F, N]`` int32; tokens that are read. 0 for no request.
        positions: ``[F, N * R]`` int64.
        rope_positions: The same, as RoPE takes them.
        slots: ``[F, G, N * R]`` int64; `PAD_SLOT` for none.
    """

    def __init__(
        self,
        num_forwards: int,
        num_rows: int,
        num_groups: int,
        max_num_reqs: int,
        device: torch.device,
        *,
        has_rope_deltas: bool = False,
    ) -> None:
        self.num_forwards, self.num_rows = num_forwards, num_rows
        self._all_starts = (
            torch.arange(max_num_reqs + 1, dtype=torch.int32, device=device) * num_rows
        )
        self.starts = self._all_starts.clone()
        self.seq_lens = torch.zeros(
            num_forwards, max_num_reqs, dtype=torch.int32, device=device
        )
        self.positions = torch.zeros(
            num_forwards, max_num_reqs * num_rows, dtype=torch.int64, device=device
        )
        self.rope_positions = self.positions
        if has_rope_deltas:
            self.rope_positions = torch.zeros_like(self.positions)
        self.slots = torch.full(
            (num_forwards, num_groups, max_num_reqs * num_rows),
            PAD_SLOT,
            dtype=torch.int64,
            device=device,
        )

    def fill(self, layout: DraftLayout, groups: Sequence[int], *, write: bool) -> None:
        """Take a step's blocks; rows behind the batch are padding.

        Args:
            layout: Of B blocks.
            groups: The KV-cache group of each of its tables.
            write: Whether rows get slots.
        """
        num_reqs = len(layout.positions)
        rows = slice(0, num_reqs * self.num_rows)
        torch.clamp(self._all_starts, max=rows.stop, out=self.starts)
        last_rows = layout.seq_lens[:, self.num_rows - 1 :: self.num_rows]
        self.seq_lens[:, :num_reqs].copy_(last_rows.T)
        self.seq_lens[:, num_reqs:].zero_()
        self.positions[:, rows].copy_(self._by_forward(layout.positions))
        if self.rope_positions is not self.positions:
            rotated = self._by_forward(layout.rope_positions)
            self.rope_positions[:, rows].copy_(rotated)
        self.slots.fill_(PAD_SLOT)
        if write:
            for group, slots in zip(groups, layout.slots, strict=True):
                by_block = slots.unflatten(0, layout.positions.shape)
                self.slots[:, group, rows].copy_(self._by_forward(by_block))

    def fill_for_capture(self) -> None:
        """Take N requests without a prefix that write nothing."""
        self.starts.copy_(self._all_starts)
        for forward, seq_lens in enumerate(self.seq_lens):
            seq_lens.fill_((forward + 1) * self.num_rows)
        self.slots.fill_(PAD_SLOT)

    def block_positions(self, num_reqs: int) -> torch.Tensor:
        """Positions for RoPE, block by block. ``[num_reqs, k]`` int64."""
        rows = self.rope_positions[:, : num_reqs * self.num_rows]
        return rows.unflatten(1, (num_reqs, -1)).transpose(0, 1).flatten(1)

    def _by_forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``[B, k]`` to ``[F, B * R]``."""
        return rows.unflatten(1, (self.num_forwards, -1)).transpose(0, 1).flatten(1)
