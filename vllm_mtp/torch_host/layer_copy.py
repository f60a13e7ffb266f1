# SPDX-License-Identifier: Apache-2.0
"""A target's layer as one of the drafter's own: forms it may have, and its weights.

Families name the parts of a layer alike and mean different things by them: a
``post_attention_layernorm`` is in front of the MLP or behind attention, a norm's weight
counts from 0 or from 1. Names and shapes leave a few readings. Which one is right is
measured (`torch_host.one_layer`): a copy must give what the target's layer gives.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.errors import UnsupportedTargetError


class LayerCopy(NamedTuple):
    """One reading of a target's layer."""

    form: dict[str, Any]  # fields of `OwnLayerConfig`
    weights: dict[str, torch.Tensor]  # by the names in an `OwnLayer`


# Names of norms in a layer -> what they are in an own layer, and its placement.
_NORMS: tuple[tuple[dict[str, str], str, bool], ...] = (
    ({"input_layernorm": "input_norm"}, "before", True),
    (
        {"input_layernorm": "input_norm", "post_attention_layernorm": "mlp_norm"},
        "before",
        False,
    ),
    (
        {
            "post_attention_layernorm": "attention_out_norm",
            "post_feedforward_layernorm": "mlp_out_norm",
        },
        "after",
        False,
    ),
    (
        {
            "input_layernorm": "input_norm",
            "post_attention_layernorm": "attention_out_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "mlp_out_norm",
        },
        "around",
        False,
    ),
    (
        {
            "input_layernorm": "input_norm",
            "post_self_attn_layernorm": "attention_out_norm",
            "post_attention_layernorm": "mlp_norm",
            "post_mlp_layernorm": "mlp_out_norm",
        },
        "around",
        False,
    ),
)
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_LINEARS = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "o_proj",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "self_attn.query_layernorm": "q_norm",
    "self_attn.key_layernorm": "k_norm",
    "mlp.gate_proj": "gate_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "down_proj",
}


def readings(
    source: Mapping[str, torch.Tensor], hf_config: Any, facts: TargetFacts
) -> Iterator[LayerCopy]:
    """The ways in which a target's layer can be read, the most usual first.

    Args:
        source: The layer's tensors, named from the layer on.
        hf_config: The target's text config.
        facts: The target's, of this layer.

    Raises:
        UnsupportedTargetError: It has parts that an own layer does not have.
    """
    weights = _split(dict(source), facts)
    form, renamed = _named(weights, hf_config, facts)
    factor = getattr(hf_config, "residual_multiplier", None) or 1.0
    for name in ("o_proj.weight", "down_proj.weight"):
        renamed[name] = renamed[name] * factor
    norms = [name for name in renamed if name.endswith("norm.weight")]
    kinds = ("rms", "layer") if form["norm_placement"] == "before" else ("rms",)
    late = (False, True) if form["qk_norm"] else (False,)
    flags = (False, True)
    for norm, from_one, after_rope, v_norm in itertools.product(
        kinds, flags, late, flags
    ):
        shifted = {
            name: weight + 1.0 if from_one and name in norms else weight
            for name, weight in renamed.items()
        }
        yield LayerCopy(
            form | {"norm": norm, "qk_norm_after_rope": after_rope, "v_norm": v_norm},
            shifted,
        )


def _split(
    weights: dict[str, torch.Tensor], facts: TargetFacts
) -> dict[str, torch.Tensor]:
    """Take merged projections apart."""
    queries = facts.num_attention_heads * facts.head_dim
    keys = facts.num_key_value_heads * facts.head_dim
    for kind in ("weight", "bias"):
        if (merged := weights.pop(f"self_attn.qkv_proj.{kind}", None)) is not None:
            names, sizes = ("q_proj", "k_proj", "v_proj"), (queries, keys, keys)
            for name, part in zip(names, merged.split(sizes), strict=True):
                weights[f"self_attn.{name}.{kind}"] = part
        if (merged := weights.pop(f"mlp.gate_up_proj.{kind}", None)) is not None:
            gate, up = merged.chunk(2)
            weights[f"mlp.gate_proj.{kind}"] = gate
            weights[f"mlp.up_proj.{kind}"] = up
    query = weights.get("self_attn.q_proj.weight")
    if query is not None and len(query) == 2 * queries:
        # Of each head first the query, then the gate.
        pairs = query.unflatten(0, (facts.num_attention_heads, 2, facts.head_dim))
        weights["self_attn.q_proj.weight"] = pairs[:, 0].flatten(0, 1)
        weights["output_gate_proj.weight"] = pairs[:, 1].flatten(0, 1)
    key = weights.get("self_attn.k_proj.weight")
    if key is not None:  # some have one projection for keys and values
        weights.setdefault("self_attn.v_proj.weight", key)
    return weights


def _named(
    weights: dict[str, torch.Tensor], hf_config: Any, facts: TargetFacts
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Fields that names and shapes give, and the weights under our names."""
    odd: list[str] = []
    renamed: dict[str, torch.Tensor] = {}
    norms: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        path, _, kind = name.rpartition(".")
        if path in _LINEARS:
            renamed[f"{_LINEARS[path]}.{kind}"] = weight
        elif "norm" in path and "." not in path and kind == "weight":
            norms[path] = weight
        elif name == "layer_scalar":
            renamed["output_scale"] = weight.reshape(1)
        elif name == "output_gate_proj.weight":
            renamed[name] = weight
        else:
            odd.append(name)
    if (bias := renamed.pop("o_proj.bias", None)) is not None:
        renamed["o_bias"] = bias
    known = next((entry for entry in _NORMS if set(entry[0]) == set(norms)), None)
    odd += [
        name
        for name in renamed
        if name.startswith(("gate", "up", "down")) and name.endswith("bias")
    ]
    missing = {"q_proj.weight", "o_proj.weight", "down_proj.weight"} - set(renamed)
    activation = getattr(hf_config, "hidden_act", None) or getattr(
        hf_config, "hidden_activation", None
    )
    if odd or missing or known is None or activation not in _ACTIVATIONS:
        parts = []
        if any("expert" in name for name in odd):
            parts.append("a mixture of experts")
        elif odd or missing:
            parts.append(f"weights {sorted([*odd, *missing])[:8]}")
        if known is None:
            parts.append(f"norms {sorted(norms)}")
        if activation not in _ACTIVATIONS:
            parts.append(f"activation {activation!r}")
        raise UnsupportedTargetError(
            f"the target's layers ({hf_config.model_type!r}) have parts that an own "
            f"layer does not have, or lack some ({'; '.join(parts)}), so they cannot "
            "be copied. Use shared layers, or --own-init random."
        )
    ours, placement, parallel = known
    renamed |= {f"{ours[name]}.weight": weight for name, weight in norms.items()}
    q_norm = renamed.get("q_norm.weight")
    form = {
        "norm_placement": placement,
        "parallel": parallel,
        "qkv_bias": "q_proj.bias" in renamed,
        "o_bias": "o_bias" in renamed,
        "qk_norm": q_norm is not None,
        "qk_norm_whole": q_norm is not None and len(q_norm) != facts.head_dim,
        "output_gate": "output_gate_proj.weight" in renamed,
        "output_scale": "output_scale" in renamed,
        "activation": _ACTIVATIONS[activation],
    }
    return form, renamed
