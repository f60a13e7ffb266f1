# SPDX-License-Identifier: Apache-2.0
"""What the target has computed for known text, and what blocks behind it read."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from vllm_mtp.torch_host.block_attention import BlockSlice, block_slices
from vllm_mtp.torch_host.flex_blocks import flex_mask


@dataclass(frozen=True)
class TargetStates:
    """What the target has computed for one sequence of T tokens.

    Keys carry RoPE already, exactly as vLLM's cache holds them.
    """

    keys: dict[int, torch.Tensor]  # layer -> [kv_heads, T, head_dim]
    values: dict[int, torch.Tensor]  # layer -> [kv_heads, T, head_dim]
    hidden: torch.Tensor  # [T, hidden_size], after the final norm
    # layer -> [T, hidden_size], the residual stream behind it; only if asked for
    streams: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.hidden.shape[0]


@dataclass
class Read:
    """What the blocks behind one sequence read."""

    states: TargetStates
    prefix_lens: torch.Tensor  # [B] int64
    num_draft_tokens: int
    prefix_window: int | None
    causal: bool = True
    _slices: dict[Any, list[BlockSlice]] = field(default_factory=dict)
    _masks: dict[Any, BlockMask] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(self.prefix_lens) * self.num_draft_tokens

    def slices(
        self, window: int | None, num_heads: int, device: torch.device
    ) -> list[BlockSlice]:
        """For all layers of one window and number of heads, where their queries are."""
        key = (window, num_heads, device)
        if key not in self._slices:
            self._slices[key] = block_slices(
                self.prefix_lens.to(device),
                self.num_draft_tokens,
                num_heads,
                window,
                self.prefix_window,
                causal=self.causal,
            )
        return self._slices[key]

    def mask(self, window: int | None, device: torch.device) -> BlockMask:
        """For all layers of one window."""
        assert self.causal, "flex is refused for blocks that are not"
        key = (window, device)
        if key not in self._masks:
            self._masks[key] = flex_mask(
                self.prefix_lens.to(device),
                self.num_draft_tokens,
                window,
                self.prefix_window,
            )
        return self._masks[key]
