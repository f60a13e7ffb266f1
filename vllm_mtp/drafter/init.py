# SPDX-License-Identifier: Apache-2.0
"""A new drafter for a target: untrained, but loadable."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from vllm_mtp.drafter.config import (
    DrafterConfig,
    LayerConfig,
    OwnLayerConfig,
    SharedLayerConfig,
    require_window,
)
from vllm_mtp.drafter.layer_spec import BoundLayer, parse_layers
from vllm_mtp.drafter.layers import OwnLayer
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.drafter.options import DrafterOptions
from vllm_mtp.drafter.target_facts import (
    TargetFacts,
    layers_with_attention,
    safetensors_files,
    sliding_windows,
)
from vllm_mtp.errors import MTPError, UnsupportedTargetError

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def new_drafter(
    target: Path,
    layers: str,
    num_speculative_tokens: int,
    options: DrafterOptions | None = None,
    draft_token_ids: Sequence[int] | None = None,
) -> Drafter:
    """Make an untrained drafter.

    Own layers start as a copy of the target layer that they read (option
    ``own_init="random"``: as a layer that passes its input through). All
    placeholders start as the mean of the target's embeddings, a vector that
    means no token in particular.

    Args:
        target: The target's Hugging Face folder, with safetensors weights.
        layers: The layer list, such as ``shared:0-9,own:28,29``.
        num_speculative_tokens: k, the most tokens to draft per step.
        options: Everything else; None for the defaults.
        draft_token_ids: The reduced output vocabulary, in its order.

    Raises:
        LayerSpecError: ``layers`` cannot be read.
        MTPError: A value is out of its limits.
        UnsupportedTargetError: The target, or a copy of its layer, cannot work.
        TargetMismatchError: ``prefix_window`` is shorter than the target's own.
    """
    target = Path(target)
    options = options or DrafterOptions()
    options.require_valid(num_speculative_tokens)
    knobs = options.knobs()
    facts = TargetFacts.from_folder(target)
    _require_token_ids(draft_token_ids, knobs["draft_vocab_size"], facts.vocab_size)
    if draft_token_ids is not None:
        knobs["draft_vocab_size"] = len(draft_token_ids)
    hf_config = AutoConfig.from_pretrained(target).get_text_config()
    bound_layers = parse_layers(layers, facts.num_hidden_layers)
    _require_caches(bound_layers, hf_config)
    weights = TargetWeights(target)
    config = DrafterConfig(
        model_type="mtp_placeholder",
        format_version=1,
        num_speculative_tokens=num_speculative_tokens,
        layers=_layer_configs(bound_layers, options, weights, hf_config),
        markov=options.markov_config(),
        target=facts,
        **knobs,
    )
    require_window(config, sliding_windows(hf_config).__getitem__)
    drafter = Drafter(config).to(DTYPES[config.dtype])
    if drafter.draft_vocab is not None:
        drafter.draft_vocab.token_ids.copy_(torch.tensor(draft_token_ids))
    _fill(drafter, weights, options, _embedding_scale(hf_config))
    return drafter


def _require_token_ids(
    ids: Sequence[int] | None, size: int | None, vocab_size: int
) -> None:
    if size is not None and size != len(ids or ()):
        raise MTPError(
            f"draft_vocab_size: got {size}, but draft_token_ids has {len(ids or ())}; "
            "give as many token ids, or leave the size out"
        )
    if ids is None:
        return
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    if wrong or not ids or len(set(ids)) != len(ids):
        raise MTPError(
            f"draft_token_ids: expected different token ids from 0 to "
            f"{vocab_size - 1}, got {len(ids)} of which {len(set(ids))} differ and "
            f"{len(wrong)} are out of range"
        )


def _require_caches(layers: list[BoundLayer], hf_config: object) -> None:
    """Refuse layers without keys and values per head, as hybrid targets have."""
    readable = layers_with_attention(hf_config)
    if odd := sorted({layer.target_layer for layer in layers} - set(readable)):
        raise UnsupportedTargetError(
            f"layers: target layers {odd} have no keys and values per token (linear "
            f"attention or mamba?), so there is no KV cache to read; bind to {readable}"
        )


class TargetWeights:
    """Single tensors of a target's folder, read when asked for."""

    _EMBEDDINGS = ("model.embed_tokens.weight", "embed_tokens.weight")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of: dict[str, Path] = {}
        for file in safetensors_files(folder):
            with safe_open(file, framework="pt") as tensors:
                self._file_of |= dict.fromkeys(tensors.keys(), file)

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor called ``name``, or None."""
        if name not in self._file_of:
            return None
        with safe_open(self._file_of[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Tensors of one decoder layer, named from the layer on."""
        prefix = f"model.layers.{index}."
        found = {
            name.removeprefix(prefix): self.get(name)
            for name in self._file_of
            if name.startswith(prefix)
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def mean_embedding(self) -> torch.Tensor:
        """Mean input embedding. ``[hidden_size]`` float32."""
        for name in self._EMBEDDINGS:
            if (embeddings := self.get(name)) is not None:
                return embeddings.float().mean(dim=0)
        raise UnsupportedTargetError(
            f"{self._folder}: no tensor {' or '.join(self._EMBEDDINGS)} in its "
            "*.safetensors files; a drafter's placeholders start from the target's "
            "embeddings. Give a folder with safetensors weights."
        )


# Names in a drafter's own layer -> names in a Llama-like target layer.
_COPIED = {
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


def _layer_configs(
    bound: list[BoundLayer],
    options: DrafterOptions,
    weights: TargetWeights,
    hf_config: object,
) -> tuple[LayerConfig, ...]:
    own = [index for index, layer in enumerate(bound) if layer.kind == "own"]
    reads_boundary = {"none": [], "first": own[:1], "all": own}[options.boundary_hidden]
    if options.boundary_hidden != "none" and not own:
        raise MTPError(
            f"boundary_hidden: got {options.boundary_hidden!r}, but only own layers "
            "can read it and the layer list has none; use 'none', or own layers"
        )
    lora = options.lora_config()
    return tuple(
        SharedLayerConfig(target_layer=layer.target_layer, lora=lora)
        if layer.kind == "shared"
        else _own_layer_config(
            layer, options, weights, hf_config, index in reads_boundary
        )
        for index, layer in enumerate(bound)
    )


def _own_layer_config(
    bound: BoundLayer,
    options: DrafterOptions,
    weights: TargetWeights,
    hf_config: object,
    boundary_hidden: bool,
) -> OwnLayerConfig:
    layer = weights.layer(bound.target_layer)
    copy = options.own_init == "copy"
    if copy:
        _require_copyable(hf_config)
    intermediate_size = getattr(hf_config, "intermediate_size", None)
    if not intermediate_size:
        raise UnsupportedTargetError(
            f"layers: own layers take the width of their MLP from the target's dense "
            f"one (intermediate_size), and {getattr(hf_config, 'model_type', '?')!r} "
            "has none. Use shared layers."
        )
    return OwnLayerConfig(
        target_layer=bound.target_layer,
        intermediate_size=intermediate_size,
        rms_norm_eps=getattr(hf_config, "rms_norm_eps", 1e-6),
        qkv_bias=copy and "self_attn.q_proj.bias" in layer,
        qk_norm=copy and "self_attn.q_norm.weight" in layer,
        boundary_hidden=boundary_hidden,
        bridge=options.bridges,
    )


def _embedding_scale(hf_config: Any) -> float:
    """Factor from a stored embedding to what enters the target's first layer."""
    scaled = hf_config.model_type.startswith("gemma")
    return hf_config.hidden_size**0.5 if scaled else 1.0


@torch.no_grad()
def _fill(
    drafter: Drafter,
    weights: TargetWeights,
    options: DrafterOptions,
    embedding_scale: float,
) -> None:
    drafter.init_weights(torch.Generator().manual_seed(options.seed))
    if drafter.placeholders is not None:
        drafter.placeholders.copy_(weights.mean_embedding() * embedding_scale)
    if options.own_init == "copy":
        for layer in drafter.layers:
            if isinstance(layer, OwnLayer):
                _copy_layer(layer, weights)
    if options.boundary_init == "identity":
        for layer in drafter.layers:
            if isinstance(layer, OwnLayer) and layer.boundary_proj is not None:
                torch.nn.init.eye_(layer.boundary_proj.weight)


# Families whose layers compute exactly what an own layer computes.
_COPYABLE = ("llama", "mistral", "qwen2", "qwen3")


def _require_copyable(hf_config: Any) -> None:
    activation = getattr(hf_config, "hidden_act", None)
    if hf_config.model_type not in _COPYABLE or activation not in ("silu", "swish"):
        raise UnsupportedTargetError(
            f"layers of {hf_config.model_type!r} (activation {activation!r}) are not "
            "known to compute what an own layer computes (RMSNorm, GQA, SwiGLU), so "
            f"a copy could be wrong; known are {', '.join(_COPYABLE)} with 'silu'. "
            "Use shared layers, or --own-init random."
        )


def _copy_layer(layer: OwnLayer, weights: TargetWeights) -> None:
    source = weights.layer(layer.target_layer)
    renamed = {
        f"{_COPIED[name.partition('.')[0]]}.{name.partition('.')[2]}": weight
        for name, weight in layer.named_parameters()
        if not name.startswith(("boundary_proj", "bridge"))
    }
    if set(renamed) != set(source):
        odd = sorted(set(renamed) ^ set(source))
        raise UnsupportedTargetError(
            f"layer {layer.target_layer} of the target cannot be copied into an own "
            f"layer (RMSNorm, GQA, SwiGLU): differing weights {odd}. Use shared "
            "layers, or --own-init random."
        )
    for name, weight in renamed.items():
        weight.copy_(source[name])
