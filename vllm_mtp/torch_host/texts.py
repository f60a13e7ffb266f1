# SPDX-License-Identifier: Apache-2.0
"""Blocks behind known text: how training and offline checks run the drafter.

In decoding a block stands behind what was sampled so far. Behind known text, many
blocks run in one forward, each behind its own prefix of the text, and none sees
another.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.config import LAST_HIDDEN, DrafterConfig
from vllm_mtp.drafter.heads import Pick
from vllm_mtp.drafter.layout import (
    IGNORE_LABEL,
    block_labels,
    block_positions,
)
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.target_states import TargetStates


class TextBlocks(NamedTuple):
    """Blocks behind one text of T tokens."""

    token_ids: torch.Tensor  # [T] int64
    states: TargetStates  # of the whole text, or of its first max(prefix_lens) + 1
    prefix_lens: torch.Tensor  # [B] int64, 1 <= n < T; the anchor is token n
    ends: torch.Tensor | None = None  # [B] int64; tokens from there on are no labels
    # [B, placeholders] int64: tokens in place of the drafter's own placeholders; of a
    # chain [B, k - 1], in place of the true tokens behind the anchors
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
    return (
        config.shares_whole_target
        and config.prefix_window is None
        and config.chain is None
        and config.input == "block"
        and config.block_mask == "causal"
    )


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
        extra = bound.drafter.config.extra_rows
        with host.reading(behind, num_draft_tokens - 1 + extra):
            rest = bound.forward(None, positions, placeholder_ids=noise_ids)
        return torch.cat([anchors.to(rest.dtype), rest], dim=1)
    positions = _positions(texts, num_draft_tokens)
    config = bound.drafter.config
    boundary = torch.cat([boundary_of(text, config) for text in texts])
    with _reading(bound, texts, num_draft_tokens):
        if config.chain is not None:
            known = [_known_tokens(text, num_draft_tokens) for text in texts]
            return bound.known_chain(torch.cat(known), positions, boundary)
        return bound.forward(_anchors(texts), positions, boundary, noise_ids)


def streams_of(config: DrafterConfig) -> tuple[int, ...]:
    """Target layers behind which a drafter reads the stream; see `HFTarget.encode`."""
    return tuple(i for i in config.boundary_sources if i != LAST_HIDDEN)


def draft_texts(
    bound: BoundDrafter,
    texts: Sequence[TextBlocks],
    num_draft_tokens: int,
    pick: Pick,
    *,
    whole_blocks: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draft behind every prefix, as in decoding; see `BoundDrafter.propose`.

    Args:
        bound: A drafter on an `HFTarget`.
        texts: The texts and their blocks.
        num_draft_tokens: k.
        pick: The sampler.
        whole_blocks: As in `forward_texts`.
    """
    if bound.drafter.config.chain is None:
        hidden = forward_texts(
            bound, texts, num_draft_tokens, whole_blocks=whole_blocks
        )
        return bound.draft(hidden, pick)
    boundary = torch.cat([boundary_of(text, bound.drafter.config) for text in texts])
    with _reading(bound, texts, num_draft_tokens):
        positions = _positions(texts, num_draft_tokens)
        return bound.propose(_anchors(texts), positions, boundary, pick)


def _reading(
    bound: BoundDrafter, texts: Sequence[TextBlocks], num_draft_tokens: int
) -> AbstractContextManager[None]:
    """What whole blocks of the drafter read."""
    host, config = bound.target, bound.drafter.config
    assert isinstance(host, HFTarget), "known text is run in plain torch"
    return host.reading(
        [(text.states, text.prefix_lens) for text in texts],
        num_draft_tokens + config.extra_rows,
        config.prefix_window,
        causal=config.block_mask == "causal",
        chain=config.chain is not None,
    )


def _anchors(texts: Sequence[TextBlocks]) -> torch.Tensor:
    return torch.cat([text.token_ids[text.prefix_lens] for text in texts])


def _known_tokens(text: TextBlocks, num_draft_tokens: int) -> torch.Tensor:
    """Anchors and the tokens behind them ``[B, k]``, the text's own if no others are
    given; its last one is repeated where it ends, since nothing is learnt there."""
    if text.noise_ids is not None:
        anchors = text.token_ids[text.prefix_lens, None]
        return torch.cat([anchors, text.noise_ids[:, : num_draft_tokens - 1]], dim=1)
    where = block_positions(text.prefix_lens, num_draft_tokens)
    return text.token_ids[where.clamp(max=len(text.token_ids) - 1)]


def boundary_of(text: TextBlocks, config: DrafterConfig) -> torch.Tensor:
    """As `BoundDrafter.forward` takes it."""
    last, states = text.prefix_lens - 1, text.states
    sources = config.boundary_sources
    if set(sources) <= {LAST_HIDDEN}:
        return states.hidden[last]
    found = [
        states.hidden[last] if source == LAST_HIDDEN else states.streams[source][last]
        for source in sources
    ]
    return torch.stack([x.to(found[0].dtype) for x in found], dim=1)


def _positions(texts: Sequence[TextBlocks], num_draft_tokens: int) -> torch.Tensor:
    return torch.cat([block_positions(t.prefix_lens, num_draft_tokens) for t in texts])
