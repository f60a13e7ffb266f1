# SPDX-License-Identifier: Apache-2.0
"""The V2 runner's buffers hold a step's layout: blocks, chains, M-RoPE."""

import pytest
import torch

from vllm_mtp.drafter.layout import PAD_SLOT, CacheTable, DraftInputs, lay_out
from vllm_mtp.serving.v2_buffers import DraftBuffers

K, MOST_REQS = 3, 4
CPU = torch.device("cpu")


@pytest.mark.parametrize("forwards", [1, K])
def test_a_step_is_staged_for_each_forward(forwards: int) -> None:
    rows = K // forwards
    buffers = DraftBuffers(forwards, rows, 2, MOST_REQS, CPU, has_rope_deltas=True)
    buffers.fill_for_capture()
    for prefixes, deltas in (([9, 30, 4], [0, -5, -1]), ([17, 5], [-3, 0])):
        lens = torch.tensor(prefixes, dtype=torch.int32)
        table = torch.arange(1, 1 + 8 * len(lens), dtype=torch.int32).view(len(lens), 8)
        # The second request of the first step ends behind the limit.
        layout = lay_out(
            DraftInputs(lens, lens, None, [CacheTable(table, 4)], torch.tensor(deltas)),
            K,
            31,
        )
        buffers.fill(layout, [1], write=True)
        batch = len(lens)
        assert buffers.block_positions(batch).equal(layout.rope_positions)
        assert not buffers.block_positions(batch).equal(layout.positions)
        filled = batch * rows
        assert buffers.starts.tolist() == [
            min(request * rows, filled) for request in range(MOST_REQS + 1)
        ]
        slots = layout.slots[0].view(batch, K)
        for forward in range(forwards):
            mine = slice(forward * rows, (forward + 1) * rows)
            positions = layout.positions[:, mine].flatten()
            assert buffers.positions[forward, :filled].equal(positions)
            read = layout.seq_lens[:, mine][:, -1].tolist()
            assert buffers.seq_lens[forward].tolist() == [
                *read,
                *[0] * (MOST_REQS - batch),
            ]
            given = buffers.slots[forward]
            assert (given[0] == PAD_SLOT).all()  # no layer of that group is read
            assert given[1, :filled].equal(slots[:, mine].flatten())
            assert (given[1, filled:] == PAD_SLOT).all()
    buffers.fill(layout, [1], write=False)
    assert (buffers.slots == PAD_SLOT).all()
