# SPDX-License-Identifier: Apache-2.0
"""Start values of the bridges, by least squares.

An own layer that is a copy of target layer l computes what that layer computes only
if its input is that layer's input. In a drafter it is not: the layers before l are
left out. A linear map can stand in for much of what they do ("Jump to Conclusions",
arXiv 2303.09435). It need not be learnt step by step: the target's streams say what
should come out, so it is the solution of a linear system.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_mtp.drafter.bound import BoundDrafter, Traced
from vllm_mtp.drafter.layers import OwnLayer
from vllm_mtp.drafter.layout import possible_anchors
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.texts import (
    TextBlocks,
    boundary_of,
    forward_texts,
    streams_of,
)

logger = logging.getLogger("vllm.mtp_placeholder.training")

# Relative to each feature's own size; keeps the maps of rare directions small.
_RIDGE = 1e-2


def bridged_layers(drafter: Drafter) -> dict[int, OwnLayer]:
    """Layers whose bridge has something to stand in for, by their number."""
    return {
        index: layer
        for index, layer in enumerate(drafter.layers)
        if isinstance(layer, OwnLayer)
        and layer.bridge is not None
        and layer.target_layer > 0
    }


@torch.no_grad()
def fit_bridges(bound: BoundDrafter, texts: Sequence[Mapping[str, Any]]) -> None:
    """Fit every bridge, and a boundary projection beside it, layer by layer.

    Only the anchors' rows are used: placeholders carry nothing yet. Each layer is
    fitted behind the layers that are fitted already.

    Args:
        bound: The drafter on an `HFTarget`; changed in place.
        texts: Rows with ``input_ids`` (``[T]`` int64) and ``loss_spans``.
    """
    for index, layer in bridged_layers(bound.drafter).items():
        stream = layer.target_layer - 1
        sums = _Sums()
        for text in texts:
            blocks = _all_blocks(bound, text, {stream})
            features = [_inputs_of(bound, index, blocks)]
            if layer.boundary_proj is not None:
                features.append(_boundary_of(layer, bound, blocks))
            sums.add(features, blocks.states.streams[stream][blocks.prefix_lens])
        logger.info(
            "bridge of layer %d (reads target layer %d): %.2f of the stream's variance "
            "explained, median over the channels, from %d rows",
            index,
            layer.target_layer,
            _solve(layer, sums),
            sums.num_rows,
        )


class _Sums:
    """All that least squares need of rows, which need not be kept.

    Attributes:
        gram: Of the features and a one, ``[features + 1, features + 1]`` float64.
        product: Of these with what is wanted, ``[features + 1, hidden_size]`` float64.
        squares: Of what is wanted, ``[hidden_size]`` float64.
    """

    gram: torch.Tensor
    product: torch.Tensor
    squares: torch.Tensor
    num_rows = 0

    def add(self, features: Sequence[torch.Tensor], wanted: torch.Tensor) -> None:
        """Rows of features ``[rows, hidden_size]`` and of what is wanted of them
        ``[rows, hidden_size]``."""
        ones = torch.ones_like(wanted[:, :1])
        rows = torch.cat([*features, ones], dim=1).double()
        wanted = wanted.double()
        if not self.num_rows:
            size = rows.shape[1]
            self.gram = rows.new_zeros(size, size)
            self.product = rows.new_zeros(size, wanted.shape[1])
            self.squares = rows.new_zeros(wanted.shape[1])
        self.gram.addmm_(rows.T, rows)
        self.product.addmm_(rows.T, wanted)
        self.squares += wanted.square().sum(0)
        self.num_rows += len(rows)


def _all_blocks(
    bound: BoundDrafter, text: Mapping[str, Any], streams: set[int]
) -> TextBlocks:
    token_ids, host = text["input_ids"], bound.target
    assert isinstance(host, HFTarget), "known text is run in plain torch"
    anchors = possible_anchors(text["loss_spans"], len(token_ids))
    config = bound.drafter.config
    token_ids = token_ids.to(host.device)
    wanted = streams.union(streams_of(config))
    states = host.encode(token_ids, cached=config.read_layers, streams=wanted)
    return TextBlocks(token_ids, states, anchors.to(token_ids.device))


def _boundary_of(
    layer: OwnLayer, bound: BoundDrafter, blocks: TextBlocks
) -> torch.Tensor:
    """The boundary hidden state that one layer reads. ``[rows, hidden_size]``."""
    read = bound.read_boundary(boundary_of(blocks, bound.drafter.config))
    found = bound.boundary_of_layer(layer, read.of_layers)
    assert found is not None, "it reads one"
    return found


def _inputs_of(bound: BoundDrafter, index: int, blocks: TextBlocks) -> torch.Tensor:
    """What one layer gets in the anchors' rows. ``[rows, hidden_size]``."""
    seen: dict[int, torch.Tensor] = {}
    before = bound.trace
    bound.trace = seen.__setitem__
    try:
        forward_texts(bound, [blocks], num_draft_tokens=1, whole_blocks=True)
    finally:
        bound.trace = before
    rows = seen[index - 1 if index else Traced.INPUT]
    return rows.unflatten(0, (len(blocks.prefix_lens), -1))[:, 0]  # extra rows behind


def _solve(layer: OwnLayer, sums: _Sums) -> float:
    """Write the least-squares maps from the features to the stream that is wanted;
    returns the explained part of its variance, the median over the channels."""
    assert layer.bridge is not None
    gram, product = sums.gram, sums.product
    maps = torch.linalg.solve(gram + _RIDGE * gram.diagonal().diag(), product)
    size = product.shape[1]
    layer.bridge.weight.copy_(maps[:size].T)
    layer.bridge.bias.copy_(maps[-1])
    if layer.boundary_proj is not None:
        layer.boundary_proj.weight.copy_(maps[size:-1].T)
    # Autocast keeps the rounded weights that it has seen, until its block ends.
    torch.clear_autocast_cache()
    # The last feature is the one: its row of the product has the sums.
    spread = sums.squares - product[-1].square() / sums.num_rows
    left = sums.squares - (maps * (2 * product - gram @ maps)).sum(0)
    return 1 - (left / spread.clamp(min=1e-12)).median().item()
