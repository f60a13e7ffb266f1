# SPDX-License-Identifier: Apache-2.0
"""What transformers' models keep outside of their decoder layers: RoPE."""

import inspect
import sys
from typing import Any

import torch


def attention_of(layer: Any) -> Any:
    """The attention of a decoder layer."""
    names = ("self_attn", "mixer", "attention")
    found = (getattr(layer, name, None) for name in names)
    return next(part for part in found if part is not None)


def run_rows(
    layer: Any,
    rows: torch.Tensor,
    positions: torch.Tensor,
    mask: Any,
    factors: Any,
    **others: Any,
) -> torch.Tensor:
    """Call a decoder layer on rows, as a batch of one without a cache.

    Args:
        layer: The layer, or what computes with one.
        rows: ``[rows, hidden_size]``.
        positions: ``[rows]`` int64.
        mask: What the layer hands to its attention function.
        factors: From `Rope.factors`.
        others: What else it is given.

    Returns:
        ``[rows, hidden_size]``.
    """
    out = layer(
        rows[None],
        attention_mask=mask,
        position_ids=positions[None],
        past_key_values=None,
        use_cache=False,
        position_embeddings=factors,
        **others,
    )
    return (out[0] if isinstance(out, tuple) else out)[0]


class Rope:
    """RoPE of one layer; every model's file has its own functions for it.

    Args:
        decoder: With ``layers`` and, unless no layer rotates, ``rotary_emb``.
        index: The layer.
    """

    def __init__(self, decoder: Any, index: int) -> None:
        attention = attention_of(decoder.layers[index])
        self._head_dim: int = attention.head_dim
        self._rotary: Any = getattr(decoder, "rotary_emb", None)
        self._kind: tuple[str, ...] = ()
        parameters = _parameters(getattr(type(self._rotary), "forward", None))
        if "layer_type" in parameters:
            self._kind = (decoder.config.layer_types[index],)
        module = sys.modules[type(attention).__module__]
        self._apply: Any = getattr(module, "apply_rotary_pos_emb", None)
        self._takes_both = "k" in _parameters(self._apply)

    def factors(self, like: torch.Tensor, positions: torch.Tensor) -> Any:
        """What the layer is given as ``position_embeddings``; None without RoPE.

        Args:
            like: Of the device and type that are wanted.
            positions: ``[rows]`` int64; of text, so the same on all axes of M-RoPE.
        """
        if self._rotary is None:
            return None
        return self._rotary(like, positions[None], *self._kind)

    def rotate(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate as the layer's attention does.

        Args:
            positions: ``[rows]`` int64.
            query: ``[rows, heads * head_dim]``.
            key: ``[rows, kv_heads * head_dim]``.
        """
        cos, sin = (f.to(query.device) for f in self.factors(query, positions))
        query, key = self._per_head(query), self._per_head(key)
        if self._takes_both:
            query, key = self._apply(query, key, cos, sin)
        else:
            query, key = self._apply(query, cos, sin), self._apply(key, cos, sin)
        return query[0].transpose(0, 1).flatten(1), key[0].transpose(0, 1).flatten(1)

    def _per_head(self, rows: torch.Tensor) -> torch.Tensor:
        """To ``[1, heads, rows, head_dim]``."""
        return rows.unflatten(-1, (-1, self._head_dim)).transpose(0, 1)[None]


def _parameters(function: Any) -> Any:
    return () if function is None else inspect.signature(function).parameters


def depends_on_text_length(rotary: Any) -> bool:
    """Whether its factors follow the longest position that it is given."""
    kinds = getattr(rotary, "rope_type", "default")
    names = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any("dynamic" in name or name == "longrope" for name in names)
