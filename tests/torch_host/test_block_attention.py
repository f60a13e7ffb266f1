# SPDX-License-Identifier: Apache-2.0
"""Slices of blocks attend as all of them do together."""

import pytest
import torch

from vllm_mtp.torch_host import block_attention
from vllm_mtp.torch_host.block_attention import Scoring, attend_blocks, block_slices

HEADS, KV_HEADS, SIZE, K = 4, 2, 8, 3
# Neither sorted nor all different: nothing asks for that.
LENS = torch.tensor([7, 9, 30, 31, 31, 2, 44, 60])


def attended(
    windows: tuple[int | None, int | None], scoring: Scoring
) -> list[torch.Tensor]:
    """The output, and the gradients of query, key and value."""
    generator = torch.Generator().manual_seed(0)
    rows = len(LENS) * K
    inputs = [
        torch.randn(heads, rows, SIZE, generator=generator).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    past = torch.randn(2, KV_HEADS, 64, SIZE, generator=generator)
    slices = block_slices(LENS, K, HEADS, *windows)
    out = attend_blocks(*inputs, *past, slices, scoring)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return [out, *(x.grad for x in inputs if x.grad is not None)]


@pytest.mark.parametrize("most", [1, 900, 1500])
@pytest.mark.parametrize("windows", [(None, None), (5, None), (None, 32)])
@pytest.mark.parametrize(
    "scoring",
    [Scoring(0.4), Scoring(0.4, torch.linspace(-1, 2, HEADS)), Scoring(0.4, None, 1.5)],
    ids=["plain", "sinks", "capped"],
)
def test_cut_or_whole(
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    windows: tuple[int | None, int | None],
    scoring: Scoring,
) -> None:
    whole = attended(windows, scoring)
    assert len(block_slices(LENS, K, HEADS, *windows)) == 1
    monkeypatch.setattr(block_attention, "_CPU_SCORES", most)
    slices = block_slices(LENS, K, HEADS, *windows)
    assert len(slices) > 2
    assert [row for s in slices for row in range(*s.rows.indices(10**9))] == list(
        range(len(LENS) * K)
    )
    assert len(whole) == 4
    for cut, expected in zip(attended(windows, scoring), whole, strict=True):
        torch.testing.assert_close(cut, expected)


def test_a_slice_reads_no_further_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "_CPU_SCORES", 1)
    assert [s.tokens.stop for s in block_slices(LENS, K, HEADS)] == LENS.tolist()
    inside = [s.tokens for s in block_slices(LENS, K, HEADS, window=5)]
    assert [t.start for t in inside] == [max(n - 4, 0) for n in LENS.tolist()]
