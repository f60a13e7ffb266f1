# SPDX-License-Identifier: Apache-2.0
"""The drafter's forward on a device that is not the host.

The device "meta" knows shapes and holds no values. So whatever needs a value on the
host, has a shape that depends on values, or makes a tensor on the host fails.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.heads import pick_greedy
from vllm_mtp.drafter.host import OneRank
from vllm_mtp.drafter.layers import Stream
from vllm_mtp.drafter.layout import CacheTable, DraftInputs, lay_out
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter

OPTIONS = DrafterOptions(
    dtype="float32",
    boundary_hidden="all",
    markov_rank=8,
    draft_vocab_size=256,
    lora_rank=4,
    lora_modules=["q_proj", "down_proj"],
)
HIDDEN, QUERIES, VOCAB = 64, 128, 512
B, K = 3, 4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, QUERIES)
        self.down_proj = nn.Linear(96, HIDDEN)
        self.up = nn.Linear(QUERIES, 96)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up(self.q_proj(hidden)))


class Host(nn.Module, OneRank):
    """A target in name only: right shapes on the right device."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.only_layer = Layer()
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(token_ids)

    def layer(self, index: int) -> nn.Module:
        return self.only_layer

    def sliding_window(self, index: int) -> int | None:
        return None

    def run_layer(
        self, layer: nn.Module, index: int, stream: Stream, positions: torch.Tensor
    ) -> Stream:
        return Stream(layer(stream.hidden) * positions[:, None], stream.hidden)

    def rotate(
        self,
        index: int,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return query * positions[:, None], key * positions[:, None]

    def attend(
        self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        return query + key.sum(-1, keepdim=True) + value.sum(-1, keepdim=True)

    def final_norm(self, stream: Stream) -> torch.Tensor:
        return stream.summed()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)

    def logits_of_tokens(self, token_ids: torch.Tensor) -> nn.Module:
        head = nn.Linear(HIDDEN, len(token_ids), bias=False, device="meta")
        head.weight = nn.Parameter(self.head.weight[token_ids])
        return head


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x[0].item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.zeros(3),
    ],
)
def test_the_device_refuses_what_a_graph_would(wrong: Callable[..., object]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        wrong(torch.zeros(3, device="meta"))


@pytest.mark.parametrize("whole_vocab", [False, True])
@pytest.mark.parametrize("layers", ["shared:0-1,own:2,3", "own:all", "shared:all"])
def test_the_forward_needs_no_value(
    layers: str, whole_vocab: bool, tiny_llama: Path
) -> None:
    options = OPTIONS if "own" in layers else DrafterOptions(dtype="float32")
    if "shared" not in layers:
        options = DrafterOptions(dtype="float32", boundary_hidden="all", markov_rank=8)
    tokens = range(0, 512, 2) if options.draft_vocab_size else None
    config = new_drafter(tiny_llama, layers, K, options, tokens).config
    with torch.device("meta"):
        bound = BoundDrafter(Drafter(config), Host())
        lens = torch.ones(B, dtype=torch.int32)
        table = CacheTable(torch.ones(B, 8, dtype=torch.int32), 32)
        anchors = torch.ones(B, dtype=torch.int64)
        boundary = torch.zeros(B, HIDDEN)
    with torch.inference_mode():
        layout = lay_out(DraftInputs(lens, lens, lens, [table]), K, 256, 50)
        hidden = bound.forward(anchors, layout.positions, boundary)
        tokens, _ = bound.draft(hidden, pick_greedy, whole_vocab=whole_vocab)
    assert (tokens.shape, tokens.device.type) == ((B, K), "meta")
    assert (layout.slots[0].shape, layout.slots[0].device.type) == ((B * K,), "meta")
