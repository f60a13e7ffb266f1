# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp inspect``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vllm_mtp.drafter.config import (
    DrafterConfig,
    LayerConfig,
    MLPLayerConfig,
    OwnLayerConfig,
    SharedLayerConfig,
)
from vllm_mtp.flags import flag

if TYPE_CHECKING:
    from vllm_mtp.sharing.speed import SpeedRecord


@dataclass
class Inspect:
    """Say what a drafter is, what it binds to, and what a draft costs. The weights
    are checked as they would be when serving."""

    positional: ClassVar[str] = "drafter"

    drafter: str = flag(
        "the drafter's folder; where it comes first, the flag's name can be left out"
    )

    def run(self) -> int:
        from vllm_mtp.drafter.checkpoint import load_drafter
        from vllm_mtp.sharing.speed import read_speed

        config = load_drafter(self.drafter).config
        print(describe(config, read_speed(self.drafter)))
        return 0


def describe(config: DrafterConfig, speed: "SpeedRecord | None" = None) -> str:
    """A drafter in a few lines of text.

    Args:
        config: The drafter's.
        speed: What a benchmark found, if there was one.
    """
    from vllm_mtp.drafter.served import unserved_text
    from vllm_mtp.sharing.card import (
        boundary_text,
        head_text,
        placeholders_text,
        prefix_text,
        rows_text,
    )

    facts = config.target
    heads = f"{facts.num_attention_heads} heads, {facts.num_key_value_heads} KV heads"
    vocab = config.draft_vocab_size
    markov = f"rank {config.markov.rank}" if config.markov else "no"
    why = unserved_text(config)
    return "\n".join(
        [
            (
                f"drafter for      {facts.name or facts.model_type}: "
                f"{facts.model_type}, {facts.num_hidden_layers} layers, "
                f"hidden {facts.hidden_size}, {heads}, "
                f"head size {facts.head_dim}"
                + ("" if facts.layer_heads is None else " (not in all layers)")
                + f", vocabulary {facts.vocab_size}"
            ),
            f"tokens per draft {config.num_speculative_tokens} ({rows_text(config)})",
            f"placeholders     {placeholders_text(config)}",
            f"boundary hidden  {boundary_text(config)}",
            *_layer_lines(config),
            f"reads            of the prefix, {prefix_text(config)}",
            f"LM head          {head_text(config)}",
            f"Markov           {markov}",
            f"vocabulary       {f'{vocab} tokens' if vocab else 'the whole one'}",
            f"weights          {config.dtype}",
            *_cost_lines(config),
            (
                f"served           not by vLLM yet: {why}"
                if why
                else f"measured         {_measured(speed)}"
            ),
        ]
    )


def _layer_lines(config: DrafterConfig) -> list[str]:
    lines = []
    for index, layer in enumerate(config.layers):
        if isinstance(layer, SharedLayerConfig):
            lora = layer.lora
            extra = (
                f", LoRA rank {lora.rank} on {', '.join(lora.modules)}" if lora else ""
            )
            if layer.full_rank:
                extra += f", full rank on {', '.join(layer.full_rank)}"
        elif isinstance(layer, MLPLayerConfig):
            extra = f", {layer.form}"
        else:
            extra = ", bridge" if layer.bridge else ""
            if layer.boundary_hidden:
                of = layer.target_layer if layer.boundary_of == "bound" else None
                extra += ", boundary hidden" + ("" if of is None else f" of layer {of}")
        if not isinstance(layer, SharedLayerConfig) and layer.per_position:
            extra += ", weights for each position"
        lines.append(f"layer {index:<10} {layer.kind}, {_reads(layer)}{extra}")
    return lines


def _reads(layer: LayerConfig) -> str:
    if isinstance(layer, MLPLayerConfig):
        return "reads no cache"
    if isinstance(layer, OwnLayerConfig) and layer.attention == "block":
        return f"reads the block alone, RoPE of target layer {layer.target_layer}"
    return f"reads target layer {layer.target_layer}"


def _cost_lines(config: DrafterConfig) -> list[str]:
    from vllm_mtp.drafter.cost import draft_cost
    from vllm_mtp.sharing.card import cache_text

    cost = draft_cost(config)
    times = f", {cost.forwards} times over" if cost.forwards > 1 else ""
    head = "its own LM heads among them"
    if cost.head_parameters:
        head = f"{cost.head_parameters:,} of the LM head{times}"
    read = cost.kv_bytes_read_per_token
    cache = (
        f", {read:,} bytes per token of prefix that is read (the target keeps "
        f"{cost.target_kv_bytes_per_token:,})"
    )
    return [
        f"parameters       {cost.drafter_parameters:,} of its own",
        (
            f"a draft reads    {cost.draft_parameters:,} parameters "
            f"({cost.shared_parameters:,} of shared layers{times}, {head}): "
            f"{cost.relative_weights:.2f} of the weights that a target step reads"
        ),
        f"KV cache         none of its own: {cache_text(config)}{cache * bool(read)}",
    ]


def _measured(speed: "SpeedRecord | None") -> str:
    from vllm_mtp.sharing.speed import steps_text

    text = steps_text(speed) if speed else ""
    if speed is None or not text:
        return (
            "not here; `vllm-mtp bench --profile --into-card` measures a draft's time"
        )
    return f"{text} ({speed.device})"
