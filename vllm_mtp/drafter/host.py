# SPDX-License-Identifier: Apache-2.0
"""What a drafter needs of the target that it runs on.

The drafter's own modules are the same everywhere. All that differs between
training and serving stands behind ``TargetHost``: transformers with the
prefix's keys and values as tensors (`torch_host`), or vLLM with its paged
cache (`serving`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from vllm_mtp.drafter.layers import Stream


class TargetHost(Protocol):
    """A frozen target, ready to serve one forward of the drafter.

    The prefix's keys and values, and what each row may read of them, are set by
    the host's owner beforehand (vLLM: the forward context).

    Several ranks may share the target's layers (tensor parallel). Each then sees its
    own heads alone, and every rank the whole hidden states and logits.
    """

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum partial results over the ranks.

        Args:
            partial: ``[rows, hidden_size]``; may be overwritten.
        """

    def without_all_reduce(self, linear: nn.Module) -> nn.Module | None:
        """Take the sum over ranks out of one of the target's linear modules.

        Args:
            linear: Part of a decoder layer; left as it is.

        Returns:
            A module with the same weights that gives this rank's partial result,
            or None where ``linear`` does not sum over ranks.
        """

    def keys_are_values(self, index: int) -> bool:
        """Whether a layer's values are what its ``k_proj`` gives, though the host has
        rows for both in one merged module."""

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """``[rows]`` integer to ``[rows, hidden_size]``."""

    def layer(self, index: int) -> nn.Module:
        """The target's own decoder layer."""

    def sliding_window(self, index: int) -> int | None:
        """Tokens that the layer attends to, itself included; None for all."""

    def run_layer(
        self,
        layer: Callable[..., Any],
        index: int,
        stream: "Stream",
        positions: torch.Tensor,
    ) -> "Stream":
        """Run the target's decoder layer, or a shadow of it.

        Args:
            layer: What `layer` gave, or what computes with a shadow of it.
            index: The target layer whose cache is read and written.
            stream: ``[rows, hidden_size]``.
            positions: ``[rows]`` int64.
        """

    def rotate(
        self,
        index: int,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the target's RoPE.

        Args:
            index: The target layer whose RoPE is used.
            positions: ``[rows]`` int64.
            query: ``[rows, heads * head_dim]``.
            key: ``[rows, kv_heads * head_dim]``.
        """

    def attend(
        self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attend to the layer's cached prefix, then to the block's own rows.

        Args:
            index: The target layer whose cache is read.
            query: ``[rows, heads * head_dim]``, RoPE applied.
            key: ``[rows, kv_heads * head_dim]``, RoPE applied.
            value: ``[rows, kv_heads * head_dim]``.

        Returns:
            ``[rows, heads * head_dim]``.
        """

    def final_norm(self, stream: "Stream") -> torch.Tensor:
        """The target's last norm. ``[rows, hidden_size]``."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, hidden_size]`` to ``[rows, vocab_size]``."""

    def logits_of_tokens(self, token_ids: torch.Tensor) -> nn.Module:
        """The LM head cut down to some tokens.

        Args:
            token_ids: ``[tokens]`` int64.

        Returns:
            A module from ``[rows, hidden_size]`` to ``[rows, tokens]``.
        """


class OneRank:
    """The part of `TargetHost` about ranks, for a target that is in one process."""

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        return partial

    def without_all_reduce(self, linear: nn.Module) -> nn.Module | None:
        return None

    def keys_are_values(self, index: int) -> bool:
        return False  # transformers merges no such layer
