# SPDX-License-Identifier: Apache-2.0
"""The two ways in which vLLM's models call a decoder layer and its RoPE.

vLLM's own models give positions and stream to a layer that has its own ``rotary_emb``.
Models that vLLM takes from transformers have one for all layers, rows in a batch of
one, and give each layer cosines and sines.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention

from vllm_mtp.drafter.followed import LayerCall
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.serving.layer_ways import LayerForm, layer_form
from vllm_mtp.torch_host.transformers_layers import Rope, depends_on_text_length

Pair = tuple[torch.Tensor, torch.Tensor]


class NativeLayer(NamedTuple):
    """A layer of vLLM's own models."""

    form: LayerForm
    rotary: nn.Module | None

    def run(
        self,
        layer: Callable[..., Any],
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> Any:
        """``[rows, hidden_size]``, or a pair of them."""
        return layer(**self.form.arguments(hidden, residual, positions))

    def rotate(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> Pair:
        """``[rows, heads * head_dim]`` each."""
        assert self.rotary is not None, "asked only where the layer rotates"
        return self.rotary(positions, query, key)


class TransformersLayer(NamedTuple):
    """A layer of a model that vLLM takes from transformers."""

    rope: Rope

    def run(
        self,
        layer: Callable[..., Any],
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """``[rows, hidden_size]``; ``residual`` is None."""
        rows = hidden[None]
        out = layer(
            rows,
            attention_mask=None,
            position_ids=positions[None],
            past_key_values=None,
            use_cache=False,
            position_embeddings=self.rope.factors(rows, positions),
        )
        return (out[0] if isinstance(out, tuple) else out)[0]

    def rotate(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> Pair:
        """``[rows, heads * head_dim]`` each."""
        return self.rope.rotate(positions, query, key)


def layer_of(
    decoder: Any, index: int, call: LayerCall, positions: torch.Tensor
) -> NativeLayer | TransformersLayer:
    """How to call one layer of the target.

    Args:
        decoder: Holds the layers.
        index: Which one.
        call: As the target called it.
        positions: ``[T]`` int64, of that call's rows.

    Raises:
        UnsupportedTargetError: It is given something that a drafter does not have.
    """
    layer = decoder.layers[index]
    name = type(layer).__name__
    if "position_embeddings" in call.arguments and hasattr(decoder, "rotary_emb"):
        if depends_on_text_length(decoder.rotary_emb):
            raise UnsupportedTargetError(
                f"{type(decoder).__name__} comes from transformers, whose RoPE "
                f"({decoder.rotary_emb.rope_type!r}) hangs on the longest text of a "
                "batch; this architecture is not supported"
            )
        if not any(isinstance(module, Attention) for module in layer.modules()):
            raise UnsupportedTargetError(
                f"{type(decoder).__name__} comes from transformers, and this vLLM "
                "keeps its attention outside of its layers. Install vLLM 0.31 or newer."
            )
        return TransformersLayer(Rope(decoder, index))
    rotary = {getattr(module, "rotary_emb", None) for module in layer.modules()}
    rotary.discard(None)
    found = rotary.pop() if len(rotary) == 1 else None
    return NativeLayer(layer_form(call, positions, name), found)
