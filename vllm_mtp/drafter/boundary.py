# SPDX-License-Identifier: Apache-2.0
"""The target's hidden states at the last position of the prefix, as a drafter reads
them.

Dimensions: B blocks, S sources (`DrafterConfig.boundary_sources`), R readers.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_mtp.drafter.config import LAST_HIDDEN, DrafterConfig, OwnLayerConfig
from vllm_mtp.drafter.layers import Stream

if TYPE_CHECKING:
    from vllm_mtp.drafter.host import TargetHost


class Boundary(NamedTuple):
    """What is read of one step's hidden states."""

    # [B, hidden_size]; the last one, or the mix of several. None if nothing reads it.
    last: torch.Tensor | None
    # [B, hidden_size], or [B, R, hidden_size] where layers read different ones.
    of_layers: torch.Tensor | None


class BoundaryReader:
    """Takes the sources apart.

    Streams of the target's inside pass its final norm, as its last hidden state has.

    Args:
        config: The drafter's.
        target: Has the norm.
    """

    def __init__(self, config: DrafterConfig, target: "TargetHost") -> None:
        self._sources = config.boundary_sources
        self._mixed = config.boundary_layers
        self._target = target
        readers = dict.fromkeys(
            _source(layer)
            for layer in config.layers
            if isinstance(layer, OwnLayerConfig) and layer.boundary_hidden
        )
        # All of them read the same one in most drafters.
        self._readers = list(readers) if set(readers) - {LAST_HIDDEN} else []

    def read(self, states: torch.Tensor, mix: torch.Tensor | None) -> Boundary:
        """Read all sources.

        Args:
            states: ``[B, S, hidden_size]``.
            mix: ``[layers]``; the weights of a mix, before their softmax.
        """
        normed = self._target.final_norm(Stream(states.flatten(0, 1)))
        parts = normed.unflatten(0, states.shape[:2]).unbind(1)
        by_source = dict(zip(self._sources, parts, strict=True))
        if LAST_HIDDEN in by_source:  # it has passed the norm already
            by_source[LAST_HIDDEN] = states[:, self._sources.index(LAST_HIDDEN)]
        elif self._mixed:
            several = torch.stack([by_source[i] for i in self._mixed], dim=-1)
            weights = torch.ones(1) if mix is None else mix.float().softmax(0)
            by_source[LAST_HIDDEN] = (several * weights.to(several)).sum(-1)
        last = by_source.get(LAST_HIDDEN)
        if not self._readers:
            return Boundary(last, last)
        return Boundary(last, torch.stack([by_source[r] for r in self._readers], 1))

    def of_layer(
        self, layer: OwnLayerConfig, of_layers: torch.Tensor
    ) -> torch.Tensor | None:
        """What one layer reads ``[rows, hidden_size]``, of ``[rows, R,
        hidden_size]``."""
        if not layer.boundary_hidden:
            return None
        return of_layers[:, self._readers.index(_source(layer))]


def _source(layer: OwnLayerConfig) -> int:
    return LAST_HIDDEN if layer.boundary_of == "last" else layer.target_layer
