# SPDX-License-Identifier: Apache-2.0
"""A transformers layer runs, and attends by a function of ours."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface

from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.torch_host.block_attention import Scoring

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scoring], torch.Tensor]
"""From query ``[heads, rows, head_dim]``, key and value ``[kv_heads, rows, head_dim]``
to ``[rows, heads * head_dim]``."""


class InLayer(NamedTuple):
    """What stands in for a layer's attention."""

    attend: Attend
    window: int | None


@contextmanager
def attention_is_ours(config: Any) -> Iterator[None]:
    """Layers hand their queries to `_attend_in_layer`, not to their own kernel."""
    before = config._attn_implementation
    config._attn_implementation = _OURS
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def attention_by(config: Any, attend: Attend, window: int | None) -> Iterator[Any]:
    """Layers attend by a function of ours.

    Args:
        config: The decoder's.
        attend: The function.
        window: Of the layer that runs.

    Yields:
        What a layer is given for a mask.
    """
    with attention_is_ours(config):
        yield InLayer(attend, window)


# Of the layer's call: what they say is in the rows already, or is nothing to attention.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "cache_position", "past_key_values", "use_cache"}
    | {"output_attentions", "output_hidden_states", "position_embeddings"}
)


def _attend_in_layer(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    *,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: ``[1, heads, rows, head_dim]`` each."""
    in_layer: InLayer = attention_mask
    odd = {
        name: setting
        for name, setting in rest.items()
        if setting is not None and name not in _WITHOUT_EFFECT
    }
    if dropout:
        odd["dropout"] = dropout
    if is_causal is False:
        odd["is_causal"] = is_causal
    if sliding_window not in (None, in_layer.window) and not _reads_all(
        module, sliding_window
    ):
        odd["sliding_window"] = sliding_window
    if odd:
        raise UnsupportedTargetError(
            f"{type(module).__name__} gives its attention {_shown(odd)}, which the "
            "torch drafter does not follow, so a drafter would be trained on other "
            "states than it is served on; use another target"
        )
    scoring = Scoring(scaling, s_aux, softcap)
    out = in_layer.attend(query[0], key[0], value[0], scoring)
    return out.unflatten(-1, (query.shape[1], -1))[None], None


def _reads_all(attention: Any, sliding_window: int) -> bool:
    """Whether no text is longer than the window, see `sliding_windows`."""
    longest = getattr(attention.config, "max_position_embeddings", None) or math.inf
    return bool(sliding_window >= longest)


def _shown(settings: dict[str, Any]) -> str:
    return ", ".join(
        name if isinstance(setting, torch.Tensor) else f"{name}={setting!r}"
        for name, setting in settings.items()
    )


_OURS = "vllm_mtp_blocks"
AttentionInterface.register(_OURS, _attend_in_layer)
