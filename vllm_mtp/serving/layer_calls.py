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
from vllm_mtp.drafter.transformers_layers import (
    Rope,
    depends_on_text_length,
    run_rows,
)
from vllm_mtp.errors import UnsupportedTargetError

Pair = tuple[torch.Tensor, torch.Tensor]

_RESIDUAL = "residual"


def first_of(result: Any) -> torch.Tensor:
    """What a module gives, without what it gives beside it."""
    return result[0] if isinstance(result, tuple) else result


class LayerForm(NamedTuple):
    """How the target calls one of its layers."""

    hidden: str  # the parameter with the stream, or with its first part
    residual: str | None  # the parameter with the second
    positions: str | None
    constants: dict[str, Any]

    def arguments(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> dict[str, Any]:
        """Of a call for other rows."""
        given = self.constants | {self.hidden: hidden}
        if self.residual is not None:
            given[self.residual] = residual
        if self.positions is not None:
            given[self.positions] = positions
        return given


def layer_form(call: LayerCall, positions: torch.Tensor, name: str) -> LayerForm:
    """Which of a layer's arguments means what.

    Args:
        call: As the target called it.
        positions: ``[T]`` int64, of the call's rows.
        name: The layer's, for messages.

    Raises:
        UnsupportedTargetError: It is given something that belongs to the text.
    """
    hidden = residual = where = None
    constants: dict[str, Any] = {}
    odd = []
    for parameter, value in call.arguments.items():
        if not isinstance(value, torch.Tensor):
            constants[parameter] = value
        elif not value.is_floating_point() and value.flatten().equal(positions):
            where = parameter
        elif hidden is None and parameter != _RESIDUAL:
            hidden = parameter
        elif residual is None and value.shape == call.arguments[hidden or ""].shape:
            residual = parameter
        else:
            odd.append(parameter)
    if odd or hidden is None or not _is_plain(constants):
        odd += [key for key in constants if not _is_plain({key: constants[key]})]
        raise UnsupportedTargetError(
            f"the target gives its layers ({name}) more than a stream and positions: "
            f"{', '.join(odd) or 'no stream'}, which a drafter does not have; this "
            "architecture is not supported"
        )
    if residual is None and constants.get(_RESIDUAL, 0) is None:
        residual = _RESIDUAL  # of the first layer, which has none yet
        del constants[_RESIDUAL]
    return LayerForm(hidden, residual, where, constants)


def _is_plain(constants: dict[str, Any]) -> bool:
    plain = (bool, int, float, str, type(None))
    return all(isinstance(value, plain) for value in constants.values())


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
        factors = self.rope.factors(hidden, positions)
        return run_rows(layer, hidden, positions, None, factors)

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
