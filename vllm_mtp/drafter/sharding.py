# SPDX-License-Identifier: Apache-2.0
"""One rank's part of a drafter, cut as vLLM cuts its target (tensor parallel).

Linear modules that lead to heads or into the MLP are cut by their outputs, those that
lead back by their inputs; the latter's products are summed over the ranks
(`TargetHost.all_reduce`). A LoRA pair is cut as the module that it changes.

All else is whole on every rank. Norms and placeholders are vectors. The boundary
projection is small beside a layer, and cutting it would cost a collective; so are what
enters a chain and a square MLP layer. So would the Markov correction, and one per
drafted position, since each waits for the token before. LM heads of the drafter's own
are whole too: they give logits as they are.
"""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_mtp.drafter.config import (
    MLP_LINEARS,
    DrafterConfig,
    MLPLayerConfig,
    OwnLayerConfig,
    SharedLayerConfig,
)
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.errors import UnsupportedTargetError

_KEYS_AND_VALUES = ("k_proj", "v_proj")
_BY_OUTPUTS = (
    "q_proj",
    *_KEYS_AND_VALUES,
    "output_gate_proj",
    "gate_proj",
    "up_proj",
)
_BY_INPUTS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Rank:
    """One of the processes that share the target's layers."""

    index: int
    size: int  # how many there are


def require_divisible(config: DrafterConfig, size: int) -> None:
    """Refuse a number of ranks that the drafter cannot be cut into.

    Raises:
        UnsupportedTargetError: Names what does not divide, and sizes that fit.
    """
    if not (problems := _indivisible(config, size)):
        return
    most = config.target.num_attention_heads
    fitting = [n for n in range(1, most + 1) if not _indivisible(config, n)]
    raise UnsupportedTargetError(
        f"tensor_parallel_size={size} does not fit this drafter and its target:\n  "
        + "\n  ".join(problems)
        + f"\nUse a size that fits: {', '.join(map(str, fitting))}."
    )


def _indivisible(config: DrafterConfig, size: int) -> list[str]:
    facts = config.target
    heads: list[tuple[str, Any]] = [("target", facts)]
    if facts.layer_heads is not None:
        heads = [
            (f"target.layer_heads.{i}", h) for i, h in enumerate(facts.layer_heads)
        ]
    sizes = {f"{key}.num_attention_heads": h.num_attention_heads for key, h in heads}
    for index, layer in enumerate(config.layers):
        if isinstance(layer, SharedLayerConfig):
            changed = {*layer.full_rank, *(layer.lora.modules if layer.lora else ())}
            if MLP_LINEARS & changed:
                sizes["target.intermediate_size"] = facts.intermediate_size or 0
        elif layer.intermediate_size is not None:
            sizes[f"layers.{index}.intermediate_size"] = layer.intermediate_size
    problems = [
        f"{key}: got {value}, expected a multiple of {size}"
        for key, value in sizes.items()
        if value % size
    ]
    problems += [
        f"layers.{index}.qk_norm_whole: got true, which needs all heads on one rank"
        for index, layer in enumerate(config.layers)
        if size > 1 and isinstance(layer, OwnLayerConfig) and layer.qk_norm_whole
    ]
    for key, of_layer in heads:
        kv_heads = of_layer.num_key_value_heads
        if max(kv_heads, size) % min(kv_heads, size):
            problems.append(
                f"{key}.num_key_value_heads: got {kv_heads}, expected a multiple or a "
                f"divisor of {size}"
            )
    return problems


def part_of(drafter: Drafter, rank: Rank) -> Drafter:
    """The drafter that one rank runs.

    Its config tells the rank's share: the heads and the width of the MLP are those
    that the rank computes.

    Args:
        drafter: The whole one; where nothing is cut, it shares its weights.
        rank: Whose part.

    Raises:
        UnsupportedTargetError: See `require_divisible`.
    """
    if rank.size == 1:
        return drafter
    require_divisible(drafter.config, rank.size)
    with torch.device("meta"):
        part = Drafter(_config_of_a_part(drafter.config, rank.size))
    facts, layers = drafter.config.target, drafter.config.layers

    def kv_heads(name: str) -> int:
        """Of the layer that a tensor belongs to."""
        layer = layers[int(name.split(".")[1])] if name.startswith("layers.") else None
        bound = getattr(layer, "target_layer", 0)
        return facts.of_layer(bound).num_key_value_heads

    weights = {
        name: _cut(name, weight, rank, kv_heads(name))
        for name, weight in drafter.state_dict().items()
    }
    part.load_state_dict(weights, strict=True, assign=True)
    return part.eval().requires_grad_(False)


def _config_of_a_part(config: DrafterConfig, size: int) -> DrafterConfig:
    facts = config.target
    mlp = facts.intermediate_size

    def of_a_part(heads: Any) -> dict[str, int]:
        return {
            "num_attention_heads": heads.num_attention_heads // size,
            # Fewer KV heads than ranks: several ranks keep the same one.
            "num_key_value_heads": max(1, heads.num_key_value_heads // size),
        }

    share: dict[str, Any] = of_a_part(facts) | {
        "intermediate_size": mlp and mlp // size
    }
    if facts.layer_heads is not None:
        share["layer_heads"] = tuple(
            heads.model_copy(update=of_a_part(heads)) for heads in facts.layer_heads
        )
    layers = tuple(
        layer.model_copy(update={"intermediate_size": layer.intermediate_size // size})
        if isinstance(layer, OwnLayerConfig | MLPLayerConfig)
        and layer.intermediate_size is not None
        else layer
        for layer in config.layers
    )
    target = facts.model_copy(update=share)
    return config.model_copy(update={"layers": layers, "target": target})


def _cut(name: str, weight: torch.Tensor, rank: Rank, kv_heads: int) -> torch.Tensor:
    """The rank's part of one tensor of the checkpoint."""
    path, _, kind = name.rpartition(".")
    module = path.rpartition(".")[2]
    # From the end: the weights of several positions stand in one tensor.
    if module in _BY_OUTPUTS and kind in ("weight", "b"):
        dim = -2
    elif (module in _BY_OUTPUTS and kind == "bias") or (
        module in _BY_INPUTS and kind in ("weight", "a")
    ):
        dim = -1
    else:
        return weight
    parts = min(rank.size, kv_heads) if module in _KEYS_AND_VALUES else rank.size
    part = weight.chunk(parts, dim)[rank.index * parts // rank.size]
    # A copy, so that the whole weight can be freed.
    return part.clone(memory_format=torch.contiguous_format)
