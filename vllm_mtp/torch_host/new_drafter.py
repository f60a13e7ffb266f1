# SPDX-License-Identifier: Apache-2.0
"""A new drafter for a target: untrained, but loadable."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_mtp.drafter.config import (
    DrafterConfig,
    LayerConfig,
    OwnLayerConfig,
    require_window,
)
from vllm_mtp.drafter.layer_spec import ListedLayer, parse_layers
from vllm_mtp.drafter.layers import OwnLayer, set_identity
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.drafter.options import DrafterOptions, valid
from vllm_mtp.drafter.target_facts import (
    TargetFacts,
    hf_config_of,
    layers_with_attention,
    safetensors_files,
    sliding_windows,
)
from vllm_mtp.errors import MTPError, UnsupportedTargetError
from vllm_mtp.torch_host.dequantise import dequantised
from vllm_mtp.torch_host.layer_copy import LayerCopy
from vllm_mtp.torch_host.load import class_of
from vllm_mtp.torch_host.one_layer import copy_of_layer

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
    whole_config = hf_config_of(target)
    hf_config = whole_config.get_text_config()
    bound_layers = bind_layers(layers, hf_config)
    weights = TargetWeights(target, facts)
    copies = {}
    if options.own_init == "copy":
        copies = _copies(bound_layers, weights, whole_config, facts)
    config = new_config(
        hf_config,
        facts,
        bound_layers,
        num_speculative_tokens,
        options,
        {index: copied.form for index, copied in copies.items()},
        **knobs,
    )
    drafter = Drafter(config).to(DTYPES[config.dtype])
    if drafter.draft_vocab is not None:
        drafter.draft_vocab.token_ids.copy_(torch.tensor(draft_token_ids))
    _fill(drafter, weights, options, copies, whole_config)
    return drafter


def bind_layers(layers: str, hf_config: Any) -> list[ListedLayer]:
    """Read a layer list for a target.

    Args:
        layers: Such as ``shared:0-9,own:28,29``.
        hf_config: The target's text config.

    Raises:
        LayerSpecError: It cannot be read.
        UnsupportedTargetError: A layer has no cache to read.
    """
    bound = parse_layers(layers, hf_config.num_hidden_layers)
    _require_caches(bound, hf_config)
    return bound


def new_config(
    hf_config: Any,
    facts: TargetFacts,
    bound: Sequence[ListedLayer],
    num_speculative_tokens: int,
    options: DrafterOptions,
    forms: Mapping[int, Mapping[str, Any]],
    **knobs: Any,
) -> DrafterConfig:
    """The config of a new drafter.

    Args:
        hf_config: The target's text config.
        facts: The target's.
        bound: The layers.
        num_speculative_tokens: k.
        options: Everything else.
        forms: By target layer, fields of `OwnLayerConfig` that a copy of it has.
        knobs: What the config's knobs are, see `DrafterOptions.knobs`.

    Raises:
        UnsupportedTargetError: The target cannot have such layers.
        TargetMismatchError: ``prefix_window`` is shorter than the target's own.
    """
    config: DrafterConfig = valid(
        DrafterConfig,
        "",
        model_type="mtp_placeholder",
        format_version=1,
        num_speculative_tokens=num_speculative_tokens,
        layers=_layer_configs(bound, options, forms, hf_config),
        markov=options.markov_config(),
        noise=options.noise_config(num_speculative_tokens - 1, facts.vocab_size),
        chain=options.chain_config(_eps_of(hf_config)),
        boundary_layers=tuple(options.boundary_layers),
        target=facts,
        **knobs,
    )
    require_window(config, sliding_windows(hf_config).__getitem__)
    return config


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


def _require_caches(layers: list[ListedLayer], hf_config: object) -> None:
    """Refuse layers without keys and values per head, as hybrid targets have."""
    readable = layers_with_attention(hf_config)
    wanted = {i for layer in layers if (i := layer.target_layer) is not None}
    if odd := sorted(wanted - set(readable)):
        raise UnsupportedTargetError(
            f"layers: target layers {odd} have no keys and values per token (linear "
            f"attention or mamba?), so there is no KV cache to read; bind to {readable}"
        )


# How families call their input embedding.
_EMBEDDING = re.compile(
    r"(?P<base>.*?)(?:embed_tokens|embeddings|wte|word_embeddings|embed_in"
    r"|tok_embeddings)\.weight"
)
# Parts of a folder that are not the target's text part.
_OTHER_PARTS = re.compile(r"(^|\.)(visual|vision|audio|mtp|speech|eagle)")


class TargetWeights:
    """Single tensors of a target's folder, read when asked for.

    Args:
        folder: The target's.
        facts: Its facts, by which the text part is told from others.
    """

    def __init__(self, folder: Path, facts: TargetFacts) -> None:
        self._folder = folder
        quantised = getattr(hf_config_of(folder), "quantization_config", None) or {}
        self._block = quantised.get("weight_block_size")
        self._file_of: dict[str, Path] = {}
        shapes: dict[str, list[int]] = {}
        for file in safetensors_files(folder):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    self._file_of[name] = file
                    if _EMBEDDING.fullmatch(name):
                        shapes[name] = tensors.get_slice(name).get_shape()
        fitting = [
            name
            for name, shape in shapes.items()
            if len(shape) == 2
            and shape[0] >= facts.vocab_size
            and shape[1] == facts.hidden_size
            and not _OTHER_PARTS.search(name)
        ]
        self._embedding = min(fitting, key=len, default=None)
        match = _EMBEDDING.fullmatch(self._embedding or "")
        self._base = match["base"] if match else "model."

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor called ``name``, or None."""
        if name not in self._file_of:
            return None
        with safe_open(self._file_of[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Tensors of one decoder layer, named from the layer on; not quantised."""
        prefix = f"{self._base}layers.{index}."
        found = {
            name.removeprefix(prefix): self.get(name)
            for name in self._file_of
            if name.startswith(prefix)
        }
        whole = {name: tensor for name, tensor in found.items() if tensor is not None}
        return dequantised(whole, self._block)

    def mean_embedding(self) -> torch.Tensor:
        """Mean input embedding. ``[hidden_size]`` float32."""
        embeddings = self.get(self._embedding_name())
        assert embeddings is not None, "the name is one of the folder's"
        return embeddings.float().mean(dim=0)

    def embeddings(self, token_ids: Sequence[int], hf_config: Any) -> torch.Tensor:
        """Embeddings as they enter the target's first layer.

        Args:
            token_ids: N of them.
            hf_config: The target's, whole; its model's own embedding is run, which may
                scale or norm what is stored.

        Returns:
            ``[N, hidden_size]``, in the type that the target stores.

        Raises:
            UnsupportedTargetError: The folder has no embeddings, or packed ones.
        """
        name = self._embedding_name()
        with safe_open(self._file_of[name], framework="pt") as tensors:
            stored = tensors.get_slice(name)
            rows = torch.cat([stored[i : i + 1] for i in token_ids])
        if not rows.is_floating_point():
            raise UnsupportedTargetError(
                f"{self._folder}: its embeddings ({name}) are stored as {rows.dtype}, "
                "and noise tokens need them as numbers; name a copy of the target that "
                "is not quantised"
            )
        with torch.device("meta"):
            model = class_of(hf_config).from_config(hf_config)
        embedding = model.get_input_embeddings()
        embedding.padding_idx = None  # may be none of these rows
        embedding.weight = torch.nn.Parameter(rows, requires_grad=False)
        embedding.to_empty(device="cpu")
        model._init_weights(embedding)  # of what it holds besides its weight
        embedding.weight = torch.nn.Parameter(rows, requires_grad=False)
        with torch.no_grad():
            embedded = embedding(torch.arange(len(rows)))
        return embedded * _multiplier(hf_config.get_text_config())

    def lm_head(self) -> torch.Tensor:
        """Rows of the LM head, or of the embeddings where these are the head.
        ``[vocab_size, hidden_size]``.

        Raises:
            UnsupportedTargetError: The folder has neither, or packed ones.
        """
        heads = [name for name in self._file_of if name.endswith("lm_head.weight")]
        name = min(heads, key=len) if heads else self._embedding_name()
        rows = self.get(name)
        if rows is None or not rows.is_floating_point():
            raise UnsupportedTargetError(
                f"{self._folder}: its LM head ({name}) is not stored as numbers, and "
                "lm_head 'own' starts from it; name a copy that is not quantised"
            )
        return rows

    def _embedding_name(self) -> str:
        if self._embedding is None:
            raise UnsupportedTargetError(
                f"{self._folder}: no tensor in its *.safetensors files is named and "
                "shaped like an input embedding (such as model.embed_tokens.weight), "
                "which a drafter's placeholders start from. Give a folder with "
                "safetensors weights."
            )
        return self._embedding


def _copies(
    bound: list[ListedLayer], weights: TargetWeights, hf_config: Any, facts: TargetFacts
) -> dict[int, LayerCopy]:
    """Copies of the target layers that own layers read, by layer."""
    wanted = own_layers(bound)
    return {
        index: copy_of_layer(
            hf_config,
            index,
            weights.layer(index),
            partial(_own_layer_config, index, hf_config.get_text_config()),
            facts,
        )
        for index in sorted(wanted)
    }


def _layer_configs(
    bound: Sequence[ListedLayer],
    options: DrafterOptions,
    forms: Mapping[int, Mapping[str, Any]],
    hf_config: Any,
) -> tuple[LayerConfig, ...]:
    own = [index for index, layer in enumerate(bound) if layer.kind == "own"]
    reads_boundary = {"none": [], "first": own[:1], "all": own}[options.boundary_hidden]
    if options.boundary_hidden != "none" and not own:
        raise MTPError(
            f"boundary_hidden: got {options.boundary_hidden!r}, but only own layers "
            "can read it and the layer list has none; use 'none', or own layers"
        )

    def config_of(index: int, layer: ListedLayer) -> LayerConfig:
        if layer.target_layer is None:
            size = _mlp_size(hf_config)
            return options.mlp_layer(size or hf_config.hidden_size, _eps_of(hf_config))
        if layer.kind == "shared":
            return options.shared_layer(layer.target_layer)
        boundary = index in reads_boundary
        form = {
            **forms.get(layer.target_layer, {}),
            "boundary_hidden": boundary,
            "boundary_of": options.boundary_of if boundary else "last",
            "bridge": options.bridges,
            "attention": options.own_attention,
            "per_position": options.per_position,
        }
        return _own_layer_config(layer.target_layer, hf_config, form)

    return tuple(config_of(index, layer) for index, layer in enumerate(bound))


def own_layers(listed: Sequence[ListedLayer]) -> set[int]:
    """Target layers that own layers are bound to."""
    own = (layer.target_layer for layer in listed if layer.kind == "own")
    return {index for index in own if index is not None}


def _own_layer_config(
    target_layer: int, hf_config: Any, form: dict[str, Any]
) -> OwnLayerConfig:
    values = getattr(hf_config, "v_head_dim", None)
    if values is not None and values != (getattr(hf_config, "head_dim", 0) or values):
        raise UnsupportedTargetError(
            f"layers: {hf_config.model_type!r} has values of another size than its "
            f"keys (v_head_dim {values}), which own layers do not. Use shared layers."
        )
    size = _mlp_size(hf_config)
    if not size:
        raise UnsupportedTargetError(
            "layers: own layers take the width of their MLP from the target's "
            "(intermediate_size or moe_intermediate_size), and "
            f"{getattr(hf_config, 'model_type', '?')!r} has none. Use shared layers."
        )
    return valid(
        OwnLayerConfig,
        "",
        target_layer=target_layer,
        intermediate_size=size,
        rms_norm_eps=_eps_of(hf_config),
        **form,
    )


def _mlp_size(hf_config: Any) -> int:
    """Width of the target's MLP; 0 where it is not known."""
    if size := getattr(hf_config, "intermediate_size", None):
        return size
    # Of a mixture of experts: as wide as those that a token goes through.
    expert = getattr(hf_config, "moe_intermediate_size", None) or 0
    return expert * (getattr(hf_config, "num_experts_per_tok", None) or 1)


def _eps_of(hf_config: Any) -> float:
    names = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon")
    return next((e for name in names if (e := getattr(hf_config, name, None))), 1e-6)


def _embedding_scale(hf_config: Any) -> float:
    """Factor from a stored embedding to what enters the target's first layer."""
    if hf_config.model_type.startswith("gemma"):
        return hf_config.hidden_size**0.5
    return _multiplier(hf_config)


def _multiplier(hf_config: Any) -> float:
    """Of a decoder that scales what its embedding module gives."""
    return getattr(hf_config, "embedding_multiplier", None) or 1.0


@torch.no_grad()
def _fill(
    drafter: Drafter,
    weights: TargetWeights,
    options: DrafterOptions,
    copies: dict[int, LayerCopy],
    hf_config: Any,
) -> None:
    drafter.init_weights(torch.Generator().manual_seed(options.seed))
    if drafter.placeholders is not None:
        if noise := drafter.config.noise:
            start = weights.embeddings(noise.token_ids, hf_config)
        else:
            scale = _embedding_scale(hf_config.get_text_config())
            start = weights.mean_embedding() * scale
        drafter.placeholders.copy_(start)
    if drafter.lm_heads is not None:
        # Some are stored with more rows than there are tokens.
        rows = weights.lm_head()[: drafter.config.target.vocab_size]
        if drafter.draft_vocab is not None:
            rows = rows[drafter.draft_vocab.token_ids]
        drafter.lm_heads.weight.copy_(rows)
    for layer in drafter.layers:
        if not isinstance(layer, OwnLayer):
            continue
        if (copied := copies.get(layer.target_layer)) is not None:
            ours = dict(layer.named_parameters())
            for name, weight in copied.weights.items():
                ours[name].copy_(weight)  # each position begins with the same
        if options.boundary_init == "identity" and layer.boundary_proj is not None:
            set_identity(layer.boundary_proj.weight)
