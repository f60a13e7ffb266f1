# SPDX-License-Identifier: Apache-2.0
"""vLLM's linear attention on CPUs, as our ledger mends it: steps with any drafts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from vllm_mtp.serving import ledger, versions
from vllm_mtp.serving.hooks import spec_forward

pytestmark = pytest.mark.skipif(
    not versions.is_older_than(ledger.CPU_GDN.fixed_in or ""), reason="needs no patch"
)

HEAD, WIDTH, MOST = 128, 4, 7  # most drafts of a step
TOKENS = MOST + 1
DIM = 3 * HEAD


def make_layer() -> Any:
    torch.manual_seed(0)
    conv = nn.Conv1d(DIM, DIM, WIDTH, groups=DIM, bias=False).bfloat16()
    conv.requires_grad_(False)
    dispatch_cpu_unquantized_gemm(conv, remove_weight=False)

    def split(rows: torch.Tensor) -> Any:
        return (part[None, :, None] for part in rows.split(HEAD, dim=-1))

    return SimpleNamespace(
        conv1d=conv,
        activation="silu",
        rearrange_mixed_qkv=split,
        A_log=torch.zeros(1),
        dt_bias=torch.zeros(1, dtype=torch.bfloat16),
    )


def vllm_alone() -> Any:
    """vLLM's function, also where an engine of this process has patched it."""
    current: Any = gdn_attention._spec_forward
    return getattr(current, "__wrapped__", current)


class Requests:
    """Two requests over the same tokens, with states of their own."""

    def __init__(self, run: Any) -> None:
        self.run, self.layer = run, make_layer()
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randn(TOKENS, DIM, generator=generator).bfloat16()
        self.gates = torch.randn(2, TOKENS, 1, generator=generator).bfloat16()
        columns = WIDTH - 1 + MOST
        self.conv = torch.zeros(2 * TOKENS, columns, DIM).bfloat16().transpose(1, 2)
        self.states = torch.zeros(2 * TOKENS, 1, HEAD, HEAD)
        self.slots = torch.arange(2 * TOKENS, dtype=torch.int32).view(2, TOKENS)

    def step(
        self, starts: list[int], lengths: list[int], accepted: list[int]
    ) -> list[torch.Tensor]:
        """Rows from ``starts`` on; behind what was wrong, wrong ones."""
        places = [
            place
            for s, n in zip(starts, lengths, strict=True)
            for place in range(s, s + n)
        ]
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        metadata = SimpleNamespace(
            num_spec_decodes=2,
            spec_state_indices_tensor=self.slots,
            spec_query_start_loc=ends,
            num_accepted_tokens=torch.tensor(accepted, dtype=torch.int32),
        )
        b, a = (gate[places] for gate in self.gates)
        rows = self.rows[places]
        columns = self.conv.shape[-1]
        out = self.run(
            self.layer, metadata, rows, b, a, self.conv, self.states, WIDTH, columns
        )
        return list(out.float().split(lengths))


def with_drafts(requests: Requests, steps: list[list[tuple[int, int]]]) -> torch.Tensor:
    """Go through all tokens; each step has rows and accepts some, by request."""
    outputs = torch.zeros(2, TOKENS, HEAD)
    starts, accepted = [0, 0], [1, 1]
    for step in steps:
        lengths = [length for length, _ in step]
        found = requests.step(starts, lengths, accepted)
        accepted = [kept for _, kept in step]
        for request, kept in enumerate(accepted):
            place = starts[request]
            outputs[request, place : place + kept] = found[request][:kept].flatten(1)
            starts[request] += kept
    assert starts == [TOKENS, TOKENS]
    return outputs


# (rows, of which are kept), for both requests.
RAGGED = {
    "fewer than before": [[(4, 4), (4, 4)], [(1, 1), (2, 1)], [(3, 3), (3, 3)]],
    "none at all": [[(1, 1), (1, 1)] for _ in range(TOKENS)],
    "one after many": [[(5, 5), (6, 5)], [(1, 1), (1, 1)], [(2, 2), (2, 2)]],
    "rejected ones": [[(8, 2), (5, 1)], [(3, 1), (3, 2)], [(5, 5), (5, 5)]],
}


@pytest.mark.parametrize("name", RAGGED)
def test_any_drafts_give_what_all_at_once_give(name: str) -> None:
    whole = Requests(vllm_alone()).step([0, 0], [TOKENS] * 2, [1, 1])[0]
    found = with_drafts(Requests(spec_forward(vllm_alone())), RAGGED[name])
    assert relative_error(found, whole) < 0.02


@pytest.mark.parametrize("name", RAGGED)
def test_vllm_alone_does_not(name: str) -> None:
    """So the test above can fail; when this one does, the patch can go."""
    plain = getattr(
        gdn_attention._spec_forward, "__wrapped__", gdn_attention._spec_forward
    )
    (whole, _) = Requests(plain).step([0, 0], [TOKENS] * 2, [1, 1])
    try:
        found = with_drafts(Requests(plain), RAGGED[name])
    except RuntimeError:
        return
    assert relative_error(found, whole) > 0.2


def relative_error(found: torch.Tensor, whole: torch.Tensor) -> float:
    expected = whole.flatten(1).expand_as(found)
    return float((found - expected).norm() / expected.norm())
