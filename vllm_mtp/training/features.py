# SPDX-License-Identifier: Apache-2.0
"""Feature distillation: own layers also learn the target's hidden states.

Behind the true text, row i of a block should carry what the target carries at the
row's position. That is a dense signal, where a label is one number per row.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.layers import OwnLayer
from vllm_mtp.drafter.layout import IGNORE_LABEL, block_positions
from vllm_mtp.torch_host.texts import TextBlocks


class FeatureLoss:
    """Compares the stream behind each own layer with the target's.

    An own layer bound to target layer l learns the target's stream behind l; the
    last hidden states are compared after the final norm.

    Args:
        bound: Traced from now on.
    """

    def __init__(self, bound: BoundDrafter) -> None:
        layers = bound.drafter.layers
        self._target_of = {
            index: layer.target_layer
            for index, layer in enumerate(layers)
            if isinstance(layer, OwnLayer) and index < len(layers) - 1
        }
        self._seen: dict[int, torch.Tensor] = {}
        bound.trace = self._keep

    @property
    def streams(self) -> frozenset[int]:
        """Target layers whose output is compared."""
        return frozenset(self._target_of.values())

    def _keep(self, index: int, stream: torch.Tensor) -> None:
        if index in self._target_of:
            self._seen[index] = stream

    def pop(
        self,
        texts: Sequence[TextBlocks],
        hidden: torch.Tensor,
        labels: torch.Tensor,
        count: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of the forward that just ran.

        Args:
            texts: What ran.
            hidden: ``[B, k, hidden_size]``, after the final norm.
            labels: ``[B, k]`` int64; rows without a label are left out.
            count: Labels that the mean is over, where these are some of them.

        Returns:
            Mean over the compared positions in depth of the smooth L1 error, each
            channel measured in its standard deviation within its text.
        """
        valid = labels != IGNORE_LABEL
        count = valid.sum() if count is None else count
        compared = [(hidden, [text.states.hidden for text in texts])]
        for index, stream in self._seen.items():
            layer = self._target_of[index]
            rows = [text.states.streams[layer] for text in texts]
            compared.append((stream.view_as(hidden), rows))
        self._seen = {}
        losses = [
            _relative_error(
                got[valid],
                _at_positions(rows, texts, got)[valid],
                _spreads(rows, texts, got)[valid],
            )
            for got, rows in compared
        ]
        return torch.stack(losses).mean() / count.clamp(min=1)


def _at_positions(
    of_texts: Sequence[torch.Tensor], texts: Sequence[TextBlocks], like: torch.Tensor
) -> torch.Tensor:
    """Rows ``[T, hidden_size]`` of each text at its blocks' positions."""
    parts = []
    for rows, text in zip(of_texts, texts, strict=True):
        positions = block_positions(text.prefix_lens, like.shape[1])
        parts.append(rows[positions.clamp(max=rows.shape[0] - 1)])
    return torch.cat(parts)


def _spreads(
    of_texts: Sequence[torch.Tensor], texts: Sequence[TextBlocks], like: torch.Tensor
) -> torch.Tensor:
    """Each channel's standard deviation in the text, for each row of its blocks."""
    # Some channels of a residual stream are hundreds of times larger than the rest
    # in every token; unscaled, an error would see nothing else. Each text says how
    # large for itself, so that no text's loss depends on which others a device has.
    parts = []
    for rows, text in zip(of_texts, texts, strict=True):
        spread = rows.float().std(0, correction=0).clamp(min=1e-3)
        parts.append(spread.expand(len(text.prefix_lens), like.shape[1], -1))
    return torch.cat(parts)


def _relative_error(
    got: torch.Tensor, wanted: torch.Tensor, spread: torch.Tensor
) -> torch.Tensor:
    """Sum over the rows ``[rows, hidden_size]`` of their channels' mean."""
    got, wanted = got.float() / spread, wanted.float() / spread
    return F.smooth_l1_loss(got, wanted, reduction="sum") / got.shape[-1]
