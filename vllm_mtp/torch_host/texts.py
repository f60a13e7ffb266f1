# SPDX-License-Identifier: Apache-2.0
"""Blocks behind known text: how training and offline checks run the drafter.

In decoding a block stands behind what was sampled so far. Behind known text, many
blocks run in one forward, each behind its own prefix of the text, and none sees
another.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.layout import (
    IGNORE_LABEL,
    block_labels,
    block_positions,
)
from vllm_mtp.drafter.model import BoundDrafter
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.target_states import TargetStates


class TextBlocks(NamedTuple):
    """Blocks behind one text of T tokens."""

    token_ids: torch.Tensor  # [T] int64
    states: TargetStates  # of the whole text, or of its first max(prefix_lens) + 1
    prefix_lens: torch.Tensor  # [B] int64, 1 <= n < T; the anchor is token n
    ends: torch.Tensor | None = None  # [B] int64; tokens from there on are no labels
    # [B, placeholders] int64: tokens in place of the drafter's own placeholders
    noise_ids: torch.Tensor | None = None

    def labels(self, num_draft_tokens: int) -> torch.Tensor:
        """The text's own next tokens. ``[B, k]``, see `layout.block_labels`."""
        return labels_behind(
            self.token_ids, self.prefix_lens, self.ends, num_draft_tokens
        )


def labels_behind(
    token_ids: torch.Tensor,
    prefix_lens: torch.Tensor,
    ends: torch.Tensor | None,
    num_draft_tokens: int,
) -> torch.Tensor:
    """A text's next tokens behind its blocks; arguments as in `TextBlocks`.

    Returns:
        ``[B, k]`` int64, see `layout.block_labels`.
    """
    labels = block_labels(token_ids, prefix_lens, num_draft_tokens)
    if ends is None:
        return labels
    wanted = block_positions(prefix_lens, num_draft_tokens) + 1
    return labels.masked_fill(wanted >= ends[:, None], IGNORE_LABEL)


def anchors_are_exact(config: DrafterConfig) -> bool:
    """Whether the anchors' rows are the target's own rows."""
    return config.shares_whole_target and config.prefix_window is None


def forward_texts(
    bound: BoundDrafter,
    texts: Sequence[TextBlocks],
    num_draft_tokens: int,
    *,
    whole_blocks: bool = False,
) -> torch.Tensor:
    """One forward of all blocks behind all texts.

    Where every layer of the target is shared, the anchors' rows are the target's
    own rows, which ``states`` already holds. They are taken from there, and only
    the placeholders run, unless ``whole_blocks`` is set.

    Args:
        bound: A drafter on an `HFTarget`.
        texts: The texts and their blocks.
        num_draft_tokens: k.
        whole_blocks: Run the anchors' rows in any case, as serving does.

    Returns:
        Last hidden states ``[B1 + B2 + .., k, hidden_size]``, after the final norm.
    """
    host = bound.target
    assert isinstance(host, HFTarget), "known text is run in plain torch"
    noise = [text.noise_ids for text in texts if text.noise_ids is not None]
    assert len(noise) in (0, len(texts)), "noise in all texts' blocks, or in none's"
    noise_ids = torch.cat(noise) if noise else None
    if anchors_are_exact(bound.drafter.config) and not whole_blocks:
        anchors = torch.cat([t.states.hidden[t.prefix_lens] for t in texts])[:, None]
        if num_draft_tokens == 1:
            return anchors
        # To the placeholders, the anchor is one more token of the prefix.
        behind = [(text.states, text.prefix_lens + 1) for text in texts]
        positions = _positions(texts, num_draft_tokens)[:, 1:]
        with host.reading(behind, num_draft_tokens - 1):
            rest = bound.forward(None, positions, placeholder_ids=noise_ids)
        return torch.cat([anchors.to(rest.dtype), rest], dim=1)
    behind = [(text.states, text.prefix_lens) for text in texts]
    window = bound.drafter.config.prefix_window
    with host.reading(behind, num_draft_tokens, window):
        return bound.forward(
            torch.cat([text.token_ids[text.prefix_lens] for text in texts]),
            _positions(texts, num_draft_tokens),
            torch.cat([text.states.hidden[text.prefix_lens - 1] for text in texts]),
            noise_ids,
        )


def _positions(texts: Sequence[TextBlocks], num_draft_tokens: int) -> torch.Tensor:
    return torch.cat([block_positions(t.prefix_lens, num_draft_tokens) for t in texts])
