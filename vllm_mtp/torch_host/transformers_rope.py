# SPDX-License-Identifier: Apache-2.0
"""RoPE of transformers' models, outside of their attention."""

import inspect
import sys
from typing import Any

import torch


def cos_sin(
    decoder: Any, index: int, like: torch.Tensor, positions: torch.Tensor
) -> Any:
    """What the decoder gives its layer as ``position_embeddings``.

    Args:
        decoder: With ``rotary_emb`` and, if that has several kinds, their names by
            layer.
        index: The layer.
        like: Of the device and type that are wanted.
        positions: ``[rows]`` int64.
    """
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        return None
    at = positions[None]  # of text, so the same on all axes of M-RoPE
    if "layer_type" in inspect.signature(type(rotary).forward).parameters:
        return rotary(like, at, decoder.config.layer_types[index])
    return rotary(like, at)


def apply_rope(
    attention: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate as the attention does. ``[rows, heads * head_dim]`` each.

    Every model's file has its own function for it.
    """
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb")  # noqa: B009
    query, key = _per_head(attention, query), _per_head(attention, key)
    if "k" in inspect.signature(apply).parameters:
        query, key = apply(query, key, cos, sin)
    else:
        query, key = apply(query, cos, sin), apply(key, cos, sin)
    return _rows(query), _rows(key)


def _per_head(attention: Any, rows: torch.Tensor) -> torch.Tensor:
    """To ``[1, heads, rows, head_dim]``."""
    return rows.unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)[None]


def _rows(heads: torch.Tensor) -> torch.Tensor:
    return heads[0].transpose(0, 1).flatten(1)


def depends_on_text_length(rotary: Any) -> bool:
    """Whether its factors follow the longest position that it is given."""
    kinds = getattr(rotary, "rope_type", "default")
    names = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any("dynamic" in name or name == "longrope" for name in names)
