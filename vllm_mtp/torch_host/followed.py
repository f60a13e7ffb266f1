# SPDX-License-Identifier: Apache-2.0
"""What the torch host learns of its target before any training, by running it."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vllm_mtp.drafter.followed import (
    LayerCall,
    Seen,
    some_tokens,
    watched,
)
from vllm_mtp.drafter.target_facts import long_rope_from
from vllm_mtp.drafter.transformers_layers import depends_on_text_length
from vllm_mtp.errors import UnsupportedTargetError

# Of a layer's call: what a host sets itself, or what says nothing about rows.
_SET_BY_US = frozenset(
    {"attention_mask", "position_ids", "position_embeddings", "past_key_values"}
    | {"use_cache", "cache_position", "output_attentions", "output_hidden_states"}
)


@torch.no_grad()
def run_target(
    model: Any, decoder: Any, device: torch.device
) -> tuple[Seen, dict[int, LayerCall]]:
    """Run the target over a few tokens, and keep what its layers are given and give.

    Args:
        model: A causal LM.
        decoder: Its text part, with ``layers``.
        device: Where what was seen is kept; the layers may be on several.

    Raises:
        UnsupportedTargetError: It does not run each of its layers.
    """
    embedding: nn.Module = model.get_input_embeddings()
    weight: Any = embedding.weight
    ids = some_tokens(weight.shape[0], device)
    last: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, result: Any) -> None:
        last.append(result[0][0])

    hook = decoder.register_forward_hook(keep)
    try:
        with watched(decoder.layers) as calls:
            logits = model(ids[None], use_cache=False).logits[0]
    finally:
        hook.remove()
    numbers = range(len(decoder.layers))
    if missing := sorted(set(numbers) - set(calls)):
        raise UnsupportedTargetError(
            f"target {decoder.config.model_type!r} does not run its layers {missing} "
            "for every token, so the torch drafter does not support it; use another "
            "target"
        )
    seen = Seen(
        ids,
        torch.arange(len(ids), device=device),
        [
            next(iter(calls[index].arguments.values()))[0].to(device)
            for index in numbers
        ],
        [_first(calls[index].result)[0].to(device) for index in numbers],
        last[0].to(device),
        logits.to(device),
    )
    return seen, calls


def _first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def constants_of(layer: nn.Module, call: LayerCall, kind: str) -> dict[str, Any]:
    """What a layer is given besides its stream, positions, mask and cache.

    A dict is for layers to leave something to others; it starts empty in every call.
    What its signature does not name is for attention functions, and ours needs none.

    Args:
        layer: The target's.
        call: As the target called it.
        kind: The target's, for messages.

    Raises:
        UnsupportedTargetError: It is given something that belongs to the text.
    """
    _, *others = inspect.signature(layer.forward).parameters
    kept = {
        name: call.arguments[name]
        for name in others
        if name in call.arguments and name not in _SET_BY_US
    }
    odd = [
        name
        for name, value in kept.items()
        if not isinstance(value, (bool, int, float, str, Mapping, type(None)))
    ]
    if odd:
        raise UnsupportedTargetError(
            f"target {kind!r} gives its layers {', '.join(odd)}, which a drafter does "
            "not have, so the torch drafter does not support it; use another target"
        )
    return kept


def fix_rope(decoder: Any) -> None:
    """Make RoPE independent of the text's length, as vLLM's is.

    transformers chooses longrope's factors by the longest position that it is given,
    so rows of one text could be rotated in two ways. vLLM chooses once, by
    ``max_model_len``; by default that is the config's longest, which is taken here.

    Args:
        decoder: The target's; its RoPE is changed.

    Raises:
        UnsupportedTargetError: The two scale it differently.
    """
    rotary: Any = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        return  # no layer rotates
    kinds: Any = getattr(rotary, "rope_type", "default")
    if not depends_on_text_length(rotary):
        return
    if isinstance(kinds, dict):
        raise UnsupportedTargetError(
            f"target {decoder.config.model_type!r} has layers of rope_type "
            f"{sorted(set(kinds.values()))}, one of which transformers scales by the "
            "text's length and vLLM does not, so a drafter would be trained on other "
            "keys than it is served on; use another target"
        )
    # vLLM's "dynamic" never scales; transformers' begins to behind the first length.
    if kinds == "longrope" and (switch := long_rope_from(decoder.config)):
        make = ROPE_INIT_FUNCTIONS["longrope"]
        long, _ = make(decoder.config, rotary.inv_freq.device, seq_len=switch)
        rotary.register_buffer("inv_freq", long, persistent=False)
    # No name that makes transformers compute the factors again.
    rotary.rope_type = "fixed"
