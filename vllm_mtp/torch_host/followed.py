# SPDX-License-Identifier: Apache-2.0
"""Whether the torch host computes what the target computes, seen before any training.

Models differ in more than a list of settings could name. So the target runs once over
a few tokens, as a whole and layer by layer, and both must give the same.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vllm_mtp.drafter.layers import Stream
from vllm_mtp.drafter.target_facts import long_rope_from
from vllm_mtp.errors import MTPError, UnsupportedTargetError

if TYPE_CHECKING:
    from vllm_mtp.torch_host.hf_target import HFTarget

_TOKENS = 8
# Far above what kernels and low precision differ by, in the middle of the rows: of a
# mixture of experts a row may differ by much.
_MOST = 0.25


@torch.no_grad()
def require_followed(host: "HFTarget") -> None:
    """Refuse a target whose layers, one by one, do not give what it gives.

    Raises:
        UnsupportedTargetError: They do not, or cannot be run so.
    """
    kind = host.decoder.config.model_type
    try:
        states, found = _whole_and_by_layers(host)
        ids = _some_tokens(host)
        errors = {
            "hidden states": _difference(found, states.hidden[1:]),
            "logits": _difference(
                host.logits(states.hidden), host.model(ids[None]).logits[0]
            ),
        }
    except MTPError:
        raise
    except Exception as error:  # of the model's own code
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedTargetError(
            f"target {kind!r} cannot be run layer by layer ({type(error).__name__}: "
            f"{reason}), so the torch drafter does not support it; use another target"
        ) from None
    # As "not at most", since NaN is neither.
    wrong = [name for name, error in errors.items() if not error <= _MOST]
    if wrong:
        raise UnsupportedTargetError(
            f"target {kind!r} computes something around its layers that the torch "
            f"drafter does not follow: layer by layer, its {wrong[0]} differ by "
            f"{errors[wrong[0]]:.2g} (relative), expected {_MOST} at most. A drafter "
            "would be trained on other states than it is served on; use another target"
        )


def _whole_and_by_layers(host: "HFTarget") -> tuple[Any, torch.Tensor]:
    """The target's states, and the hidden states of all tokens but the first."""
    ids = _some_tokens(host)
    states = host.encode(ids)
    positions = torch.arange(1, len(ids), device=ids.device)
    with host.reading([(states, positions)], 1):
        stream = Stream(host.embed(ids[1:]))
        for index in range(len(host.decoder.layers)):
            stream = host.run_layer(host.layer(index), index, stream, positions)
        return states, host.final_norm(stream)


def _some_tokens(host: "HFTarget") -> torch.Tensor:
    """Ids of the whole vocabulary. ``[_TOKENS]``."""
    embedding: Any = host.model.get_input_embeddings().weight
    size, device = embedding.shape[0], embedding.device
    step = max(1, size // (_TOKENS + 1))
    return (torch.arange(_TOKENS, device=device) + 1) * step % size


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference of the rows, in the middle."""
    found, expected = found.float(), expected.float()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def fix_rope(decoder: Any) -> None:
    """Make RoPE independent of the text's length, as vLLM's is.

    transformers chooses longrope's factors by the longest position that it is given,
    so rows of one text could be rotated in two ways. vLLM chooses once, by
    ``max_model_len``; by default that is the config's longest, which is taken here.

    Args:
        decoder: The target's; its RoPE is changed.

    Raises:
        UnsupportedTargetError: The two scale it differently, or there is none.
    """
    rotary: Any = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        raise UnsupportedTargetError(
            f"{type(decoder).__name__} has no `rotary_emb`; only targets with one for "
            "all layers are supported by the torch drafter"
        )
    kinds: Any = getattr(rotary, "rope_type", "default")
    of_layers = isinstance(kinds, dict)
    odd = [
        kind
        for kind in (kinds.values() if of_layers else [kinds])
        if "dynamic" in kind or (of_layers and kind == "longrope")
    ]
    if odd:
        raise UnsupportedTargetError(
            f"target {decoder.config.model_type!r} has rope_type {odd[0]!r}, which "
            "transformers scales by the text's length and vLLM does not, so a drafter "
            "would be trained on other keys than it is served on; use another target"
        )
    if kinds != "longrope":
        return
    if switch := long_rope_from(decoder.config):
        make = ROPE_INIT_FUNCTIONS["longrope"]
        long, _ = make(decoder.config, rotary.inv_freq.device, seq_len=switch)
        rotary.register_buffer("inv_freq", long, persistent=False)
    # No name that makes transformers compute the factors again.
    rotary.rope_type = "longrope, fixed"
