# SPDX-License-Identifier: Apache-2.0
"""What a drafter must know of its target, and how to tell targets apart."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from vllm_mtp.errors import (
    MTPError,
    TargetMismatchError,
    UnsupportedTargetError,
    in_one_line,
)

# Far above any model; below it, no product of sizes leaves 64 bits.
MAX_SIZE = 1 << 24
MAX_COUNT = 1 << 16

# Not part of the comparison: a copy of the target in another folder is the
# same target, and weights are compared by `weights_fingerprint` on their own.
_INFORMATIVE = frozenset({"name", "weights_fingerprint"})


class LayerHeads(BaseModel):
    """The attention heads of one target layer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    num_attention_heads: int = Field(ge=1, le=MAX_COUNT, description="Query heads.")
    num_key_value_heads: int = Field(
        ge=1, le=MAX_COUNT, description="Key and value heads."
    )
    head_dim: int = Field(ge=1, le=MAX_COUNT, description="Size of one head.")


class TargetFacts(BaseModel):
    """The target's shape: every fact that a drafter's weights depend on."""

    # protected_namespaces: `model_type` is the Hugging Face name of the field.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=()
    )

    name: str | None = Field(
        default=None, description="Name or path it was made from; informative."
    )
    model_type: str = Field(description="The target's `model_type`.")
    num_hidden_layers: int = Field(ge=1, le=MAX_COUNT, description="Number of layers.")
    hidden_size: int = Field(
        ge=1, le=MAX_SIZE, description="Width of the hidden state."
    )
    intermediate_size: int | None = Field(
        default=None,
        ge=1,
        le=MAX_SIZE,
        description="Width of the dense MLP; null for none.",
    )
    num_attention_heads: int = Field(ge=1, le=MAX_COUNT, description="Query heads.")
    num_key_value_heads: int = Field(
        ge=1, le=MAX_COUNT, description="Key and value heads."
    )
    head_dim: int = Field(ge=1, le=MAX_COUNT, description="Size of one head.")
    # Not strict, as a list may stand for it; what it holds is.
    layer_heads: tuple[LayerHeads, ...] | None = Field(
        default=None,
        strict=False,
        min_length=1,
        max_length=MAX_COUNT,
        description="The heads of every layer, where not all layers have the above; "
        "else null.",
    )
    cached_layers: tuple[int, ...] | None = Field(
        default=None,
        strict=False,
        min_length=1,
        max_length=MAX_COUNT,
        description="The layers that have keys and values of every token, where not "
        "all have; else null.",
    )
    vocab_size: int = Field(ge=1, le=MAX_SIZE, description="Size of the vocabulary.")
    rope_parameters: dict[str, JsonValue] = Field(
        description="RoPE settings as in the target's config."
    )
    weights_fingerprint: str | None = Field(
        default=None,
        description="SHA-256 over the sorted names and shapes of the target's "
        "weights; used to find the drafter when none is named.",
    )

    @model_validator(mode="after")
    def _of_its_layers(self) -> "TargetFacts":
        of_layers = self.layer_heads
        if of_layers is not None and len(of_layers) != self.num_hidden_layers:
            raise ValueError(
                f"layer_heads: got {len(of_layers)} entries, expected one for each of "
                f"the {self.num_hidden_layers} layers, or null"
            )
        last = self.num_hidden_layers - 1
        cached = self.cached_layers or ()
        if wrong := [index for index in cached if not 0 <= index <= last]:
            raise ValueError(
                f"cached_layers: got {wrong[0]}, the target has layers 0 to {last}"
            )
        return self

    def of_layer(self, index: int) -> "TargetFacts":
        """These facts with the heads of one layer, as if all had them."""
        if self.layer_heads is None:
            return self
        heads = self.layer_heads[index].model_dump()
        return self.model_copy(update={"layer_heads": None, **heads})

    @classmethod
    def from_hf_config(
        cls, hf_config: Any, *, name: str | None = None
    ) -> "TargetFacts":
        """Read the facts off a transformers config (text part).

        Args:
            hf_config: A ``PretrainedConfig``; for multimodal models the outer one.
            name: Name or path, kept for messages only.

        Raises:
            UnsupportedTargetError: The target cannot be read by our drafters.
        """
        with _named_config_errors(hf_config):
            text = hf_config.get_text_config()
            _refuse_unsupported(text)
            return cls(name=name, **_facts(text))

    @classmethod
    def from_folder(cls, folder: Path) -> "TargetFacts":
        """Read facts and weights' fingerprint of a Hugging Face folder."""
        facts = cls.from_hf_config(hf_config_of(folder), name=folder.name)
        return facts.model_copy(
            update={"weights_fingerprint": weights_fingerprint(folder)}
        )

    def differences(self, other: "TargetFacts") -> list[str]:
        """Say, fact by fact, where ``other`` is not this target."""
        return [
            f"target.{key}: the drafter was made for {expected!r}, "
            f"this target has {getattr(other, key)!r}"
            for key, expected in self
            if key not in _INFORMATIVE and getattr(other, key) != expected
        ]

    def require_same(self, other: "TargetFacts") -> None:
        """Raise unless ``other`` is this target.

        Raises:
            TargetMismatchError: Lists each differing fact.
        """
        if lines := self.differences(other):
            raise TargetMismatchError(
                "this drafter does not fit the target:\n  "
                + "\n  ".join(lines)
                + "\nUse the target that it was made for"
                + (f" ({self.name})" if self.name else "")
                + ", or make a drafter for this one: vllm-mtp init --target ..."
            )


def hf_config_of(folder: Path | str) -> Any:
    """transformers' config of a target's folder.

    Raises:
        UnsupportedTargetError: There is none, or transformers does not take it.
    """
    from transformers import AutoConfig

    path = Path(folder, "config.json")
    if not path.is_file():
        raise UnsupportedTargetError(
            f"target {folder}: no config.json in it; expected a Hugging Face folder of "
            "a causal language model"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # each config class has its own
        raise UnsupportedTargetError(
            f"{path}: transformers does not take it ({in_one_line(error, 300)}); "
            "repair the file, or install a transformers that knows the model"
        ) from None


def sliding_windows(text_config: Any) -> list[int | None]:
    """Tokens that each layer attends to, itself included; None for all.

    Args:
        text_config: A ``PretrainedConfig``, of the text part.

    Raises:
        UnsupportedTargetError: The config does not say.
    """
    with _named_config_errors(text_config):
        return _sliding_windows(text_config)


def layers_with_attention(text_config: Any) -> list[int]:
    """The layers that have keys and values per head.

    Args:
        text_config: A ``PretrainedConfig``, of the text part.

    Raises:
        UnsupportedTargetError: The config does not say.
    """
    with _named_config_errors(text_config):
        kinds = _layer_kinds(text_config)
        if kinds is None:
            return list(range(text_config.num_hidden_layers))
        return [index for index, kind in enumerate(kinds) if _is_attention(kind)]


def layers_without_values(text_config: Any) -> frozenset[int]:
    """The layers whose values are their keys: they have no ``v_proj`` (Gemma 4).

    Args:
        text_config: A ``PretrainedConfig``, of the text part.
    """
    if not getattr(text_config, "attention_k_eq_v", False):
        return frozenset()
    kinds = _layer_kinds(text_config) or []
    full = (i for i, kind in enumerate(kinds) if kind == "full_attention")
    return frozenset(full)


def long_rope_from(text_config: Any) -> int | None:
    """The least ``max_model_len`` with longrope's long factors; None for no longrope.

    vLLM rotates all positions by the long factors, or all by the short ones.

    Args:
        text_config: A ``PretrainedConfig``, of the text part.
    """
    with _named_config_errors(text_config):
        rope = _rope_parameters(text_config)
        if rope.get("rope_type") != "longrope":
            return None
        original = rope.get("original_max_position_embeddings") or getattr(
            text_config, "original_max_position_embeddings", None
        )
        if not isinstance(original, int):
            return None
        longest = text_config.max_position_embeddings
        return original + 1 if longest > original else None


def _layer_kinds(text_config: Any) -> list[str] | None:
    """What each layer is, where the config says."""
    names = ("layer_types", "layers_block_type")
    found = (getattr(text_config, name, None) for name in names)
    return next((kinds for kinds in found if kinds), None)


def _is_attention(kind: str) -> bool:
    return "attention" in kind and "linear" not in kind


@contextmanager
def _named_config_errors(config: Any) -> Iterator[None]:
    """Make whatever a config raises one line that names the target.

    Config classes run code of their own when they are asked for a value.
    """
    try:
        yield
    except MTPError:
        raise
    except Exception as error:
        fields = vars(type(config)) | vars(config)
        name = fields.get("model_type", type(config).__name__)
        raise UnsupportedTargetError(
            f"target {name!r}: its config does not give what drafters need "
            f"({in_one_line(error, 300)}). Use another target."
        ) from None


def _sliding_windows(text_config: Any) -> list[int | None]:
    longest = getattr(text_config, "max_position_embeddings", None) or math.inf
    kinds = _layer_kinds(text_config)
    if kinds is None:
        kinds = ["sliding_attention"] * text_config.num_hidden_layers
    windows = [
        getattr(layer, "sliding_window", None) if kind == "sliding_attention" else None
        for layer, kind in zip(_layer_configs(text_config), kinds, strict=True)
    ]
    # Some configs give one that no text reaches.
    return [w if w is None or w < longest else None for w in windows]


def _layer_configs(text_config: Any) -> list[Any]:
    """A config for each layer; where all layers are alike, the same one."""
    if getattr(text_config, "is_heterogeneous", False):
        return list(text_config.per_layer_config)
    return [text_config] * text_config.num_hidden_layers


def _refuse_unsupported(text: Any) -> None:
    name = getattr(text, "model_type", "?")
    if size := getattr(text, "hidden_size_per_layer_input", None):
        raise UnsupportedTargetError(
            f"target {name!r} sets hidden_size_per_layer_input={size!r}: each of its "
            "layers reads an embedding of its own, which placeholders do not have. Use "
            "another target."
        )
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedTargetError(
            f"target {name!r} uses multi-head latent attention (kv_lora_rank="
            f"{text.kv_lora_rank}); its cache holds no keys and values per head, "
            "which our drafters read. Use a target with ordinary attention."
        )
    for setting in ("index_topk", "sparse_attention_config", "rel_extent"):
        if getattr(text, setting, None):
            raise UnsupportedTargetError(
                f"target {name!r} sets {setting}: its attention is sparse or relative, "
                "which drafters do not follow. Use another target."
            )
    kinds = set(_layer_kinds(text) or ["full_attention"])
    if any("chunked" in kind for kind in kinds):
        raise UnsupportedTargetError(
            f"target {name!r} uses chunked attention, which is not supported yet. Use "
            "another target."
        )
    if not any(map(_is_attention, kinds)):
        raise UnsupportedTargetError(
            f"target {name!r} has no attention layer (layer_types: "
            f"{sorted(kinds)}); there is no KV cache to read. Use a target with "
            "attention layers."
        )
    if not getattr(text, "num_attention_heads", None):
        raise UnsupportedTargetError(
            f"target {name!r} has no num_attention_heads in its config: it has no "
            "KV cache per head (a mamba or RNN model?), which our drafters read. "
            "Use a target with attention layers."
        )


def _facts(text: Any) -> dict[str, Any]:
    heads = [_heads(layer) for layer in _layer_configs(text)]
    if (kv_heads := getattr(text, "swa_num_key_value_heads", None)) is not None:
        sliding = LayerHeads(
            num_attention_heads=text.swa_num_attention_heads,
            num_key_value_heads=kv_heads,
            head_dim=text.swa_head_dim,
        )
        pattern = text.hybrid_layer_pattern
        heads = [sliding if k else h for h, k in zip(heads, pattern, strict=True)]
    if (numbers := getattr(text, "num_attention_heads_per_layer", None)) is not None:
        heads = [
            of_layer.model_copy(update={"num_attention_heads": number})
            for of_layer, number in zip(heads, numbers, strict=True)
        ]
    cached = tuple(layers_with_attention(text))
    differ = any(of_layer != heads[0] for of_layer in heads)
    return {
        "model_type": text.model_type,
        "num_hidden_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "intermediate_size": getattr(text, "intermediate_size", None) or None,
        **heads[0].model_dump(),
        "layer_heads": tuple(heads) if differ else None,
        "cached_layers": cached if len(cached) < len(heads) else None,
        "vocab_size": text.vocab_size,
        "rope_parameters": _rope_parameters(text),
    }


def _heads(config: Any) -> LayerHeads:
    heads = config.num_attention_heads
    return LayerHeads(
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _rope_parameters(text: Any) -> dict[str, JsonValue]:
    """RoPE settings in one shape, whatever wrote the config.

    transformers 5 has ``rope_parameters``; version 4 had ``rope_theta`` and
    ``rope_scaling`` (the same content in two places).
    """
    found = getattr(text, "rope_parameters", None)
    if found is None:
        found = {"rope_theta": getattr(text, "rope_theta", None)}
        found |= getattr(text, "rope_scaling", None) or {"rope_type": "default"}
    # A round trip through JSON drops tuples and config objects.
    return json.loads(json.dumps(found, default=dict))


def weights_fingerprint(folder: Path) -> str | None:
    """Fingerprint of the weights in ``folder`` by names and shapes.

    Only the headers of the safetensors files are read.

    Returns:
        A hex SHA-256, or None where the folder holds no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for file in safetensors_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    shapes[name] = tensors.get_slice(name).get_shape()
        except (SafetensorError, OSError) as error:
            raise UnsupportedTargetError(
                f"{file}: not a whole safetensors file ({error}); copy or download "
                "the target again"
            ) from None
    return fingerprint_of_shapes(shapes) if shapes else None


# Enough to tell weights apart that were trained, little enough to read in a second.
_SAMPLE_BYTES = 4096


def weights_sample_sha256(folder: Path) -> str | None:
    """Hash the first 4 KiB of every weight in ``folder``.

    Unlike `weights_fingerprint` this tells two fine-tunes of one model apart. How
    the weights are spread over files does not matter; their dtype does.

    Returns:
        A hex SHA-256, or None where the folder holds no safetensors file.
    """
    samples: dict[str, bytes] = {}
    for file in safetensors_files(folder):
        samples |= _samples(file)
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(f"{name} {len(samples[name])}\n".encode() + samples[name])
    return digest.hexdigest() if samples else None


def _samples(file: Path) -> dict[str, bytes]:
    """The first bytes of each weight in one safetensors file.

    Read by hand, because a slice of the library's is at least a whole row, which of
    stacked experts is a matrix.
    """
    samples: dict[str, bytes] = {}
    try:
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                data.seek(8 + length + start)
                samples[name] = data.read(min(_SAMPLE_BYTES, end - start))
    except (OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise UnsupportedTargetError(
            f"{file}: not a whole safetensors file ({error}); copy or download the "
            "target again"
        ) from None
    return samples


def safetensors_files(folder: Path) -> list[Path]:
    """The weights of a Hugging Face folder, in a fixed order.

    Some repositories hold a second copy under other names (``consolidated``),
    which transformers and vLLM do not load.
    """
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if not file.name.startswith("consolidated")]


def fingerprint_of_shapes(shapes: Mapping[str, Iterable[int]]) -> str:
    """SHA-256 over the sorted names and shapes of weights."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
