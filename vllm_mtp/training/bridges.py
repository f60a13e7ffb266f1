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

from vllm_mtp.drafter.layers import OwnLayer
from vllm_mtp.drafter.layout import possible_anchors
from vllm_mtp.drafter.model import BoundDrafter, Drafter, Traced
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.texts import TextBlocks, forward_texts

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
    layers = bridged_layers(bound.drafter)
    streams = {layer.target_layer - 1 for layer in layers.values()}
    blocks = [_all_blocks(bound, text, streams) for text in texts]
    for index, layer in layers.items():
        wanted = torch.cat(
            [b.states.streams[layer.target_layer - 1][b.prefix_lens] for b in blocks]
        )
        features = [_inputs_of(bound, index, blocks)]
        if layer.boundary_proj is not None:
            features.append(
                torch.cat([b.states.hidden[b.prefix_lens - 1] for b in blocks])
            )
        explained = _solve(layer, features, wanted)
        logger.info(
            "bridge of layer %d (reads target layer %d): %.2f of the stream's variance "
            "explained, median over the channels, from %d rows",
            index,
            layer.target_layer,
            explained,
            len(wanted),
        )


def _all_blocks(
    bound: BoundDrafter, text: Mapping[str, Any], streams: set[int]
) -> TextBlocks:
    token_ids, host = text["input_ids"], bound.target
    assert isinstance(host, HFTarget), "known text is run in plain torch"
    anchors = possible_anchors(text["loss_spans"], len(token_ids))
    layers = bound.drafter.config.bound_layers
    token_ids = token_ids.to(host.model.device)
    states = host.encode(token_ids, cached=layers, streams=streams)
    return TextBlocks(token_ids, states, anchors.to(token_ids.device))


def _inputs_of(
    bound: BoundDrafter, index: int, blocks: Sequence[TextBlocks]
) -> torch.Tensor:
    """What one layer gets in the anchors' rows. ``[rows, hidden_size]``."""
    seen: dict[int, torch.Tensor] = {}
    before = bound.trace
    bound.trace = seen.__setitem__
    try:
        inputs = []
        for text in blocks:
            forward_texts(bound, [text], num_draft_tokens=1, whole_blocks=True)
            inputs.append(seen[index - 1 if index else Traced.INPUT])
    finally:
        bound.trace = before
    return torch.cat(inputs)


def _solve(
    layer: OwnLayer, features: Sequence[torch.Tensor], wanted: torch.Tensor
) -> float:
    """Write the least-squares maps from features ``[rows, hidden_size]`` to the stream
    that is wanted ``[rows, hidden_size]``; returns the explained part of its variance,
    the median over the channels."""
    assert layer.bridge is not None
    ones = torch.ones_like(wanted[:, :1])
    rows = torch.cat([*features, ones], dim=1).double()
    gram = rows.T @ rows
    gram += _RIDGE * gram.diagonal().diag()
    maps = torch.linalg.solve(gram, rows.T @ wanted.double())
    weight, *boundary, bias = maps.split([*(f.shape[1] for f in features), 1])
    layer.bridge.weight.copy_(weight.T)
    layer.bridge.bias.copy_(bias[0])
    if layer.boundary_proj is not None:
        layer.boundary_proj.weight.copy_(boundary[0].T)
    # Autocast keeps the rounded weights that it has seen, until its block ends.
    torch.clear_autocast_cache()
    left = (wanted - rows @ maps).var(0) / wanted.double().var(0).clamp(min=1e-12)
    return 1 - left.median().item()
