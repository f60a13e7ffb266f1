# SPDX-License-Identifier: Apache-2.0
"""``DrafterConfig``: the one description of a drafter.

Training, evaluation and serving all build the drafter from this object, and
``config.json`` of a checkpoint is this object as JSON. The fields' texts below
are also the reference in ``checkpoints_spec/``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vllm_mtp.drafter.target_facts import MAX_SIZE, TargetFacts
from vllm_mtp.errors import TargetMismatchError

FORMAT_VERSION: Literal[1] = 1
MAX_SPECULATIVE_TOKENS = 64
# Far above any use. A drafter is laid out before its weights are read, so a config
# alone must not be able to ask for much time or memory.
MAX_LAYERS = 512

DtypeName = Literal["bfloat16", "float16", "float32"]
LinearName = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
]
MLP_LINEARS = frozenset({"gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True)
class Knob:
    """Marks a field of `DrafterConfig` that has a flag of its own; see `options`.

    Attributes:
        default: Of the flag, where the field itself has none.
    """

    default: Any = None


class Strict(BaseModel):
    """A model that guesses nothing."""

    # strict: "4" is not 4, and 1.0 is not 1. A config that needs guessing is
    # a config that was written by something else than this package.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False
    )


class LoRAConfig(Strict):
    """Low-rank change of a shared layer, applied to placeholder rows only."""

    rank: int = Field(ge=1, le=MAX_SIZE, description="Rank of every low-rank pair.")
    alpha: float = Field(
        gt=0,
        le=MAX_SIZE,
        description="Scale: the change is multiplied by alpha / rank.",
    )
    modules: tuple[LinearName, ...] = Field(
        min_length=1,
        description="Linear modules of the layer that get a pair, by their "
        "Hugging Face names (also where vLLM merges them).",
    )

    @model_validator(mode="after")
    def _unique(self) -> "LoRAConfig":
        if len(set(self.modules)) != len(self.modules):
            raise ValueError(f"modules: named twice in {list(self.modules)}")
        return self


class SharedLayerConfig(Strict):
    """A draft layer that is the target's own layer, frozen, read in place."""

    kind: Literal["shared"] = Field(
        default="shared", description="The target's own layer, read in place."
    )
    target_layer: int = Field(
        ge=0, description="The target layer that runs, on its own KV cache."
    )
    lora: LoRAConfig | None = Field(
        default=None,
        description="Trained change for the placeholder rows. The anchor's row "
        "never sees it.",
    )


class OwnLayerConfig(Strict):
    """A draft layer with weights of its own. By default it is Llama's: RMSNorm before
    attention and MLP, GQA, SwiGLU. The other forms are for copies of other families'
    layers."""

    kind: Literal["own"] = Field(
        default="own", description="A layer with weights of its own."
    )
    target_layer: int = Field(
        ge=0, description="The target layer whose KV cache this layer reads."
    )
    intermediate_size: int = Field(ge=1, le=MAX_SIZE, description="Width of the MLP.")
    rms_norm_eps: float = Field(gt=0, le=1, description="Epsilon of its norms.")
    norm: Literal["rms", "layer"] = Field(
        default="rms",
        description="RMSNorm, or LayerNorm without a bias (it takes the mean off).",
    )
    norm_placement: Literal["before", "after", "around"] = Field(
        default="before",
        description="Where attention and MLP have a norm: on what they read, on what "
        "they give before that is added to the stream, or both.",
    )
    parallel: bool = Field(
        default=False,
        description="Whether attention and MLP read the same normed stream, and are "
        "added to it together. Norms are before them then.",
    )
    qkv_bias: bool = Field(
        default=False, description="Whether q, k and v projections have a bias."
    )
    o_bias: bool = Field(
        default=False, description="Whether the output projection has a bias."
    )
    qk_norm: bool = Field(
        default=False,
        description="Whether queries and keys pass a norm: RMSNorm per head before "
        "RoPE, if the next two do not say otherwise.",
    )
    qk_norm_whole: bool = Field(
        default=False,
        description="Whether that norm is over all heads together.",
    )
    qk_norm_after_rope: bool = Field(
        default=False, description="Whether that norm comes after RoPE."
    )
    v_norm: bool = Field(
        default=False,
        description="Whether values pass an RMSNorm per head, without weights.",
    )
    output_gate: bool = Field(
        default=False,
        description="Whether attention's output is multiplied by the sigmoid of "
        "another projection of its input.",
    )
    activation: Literal["silu", "gelu_tanh"] = Field(
        default="silu", description="Of the MLP's gate."
    )
    output_scale: bool = Field(
        default=False,
        description="Whether the stream behind the layer is multiplied by a number.",
    )
    boundary_hidden: bool = Field(
        default=False,
        description="Whether a projection of the target's last hidden state at "
        "the last position of the prefix is added to the layer's input.",
    )
    bridge: bool = Field(
        default=False,
        description="Whether the stream passes a linear map before the layer, in "
        "place of the target layers that are left out there.",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> "OwnLayerConfig":
        if self.parallel and self.norm_placement != "before":
            raise ValueError(
                f"norm_placement: got {self.norm_placement!r}, expected 'before' where "
                "parallel is true"
            )
        for name in ("qk_norm_whole", "qk_norm_after_rope"):
            if getattr(self, name) and not self.qk_norm:
                raise ValueError(f"{name}: got true, expected false without qk_norm")
        return self


LayerConfig = Annotated[SharedLayerConfig | OwnLayerConfig, Field(discriminator="kind")]


class MarkovConfig(Strict):
    """Low-rank bias on a position's logits from the token drafted before it."""

    rank: int = Field(ge=1, le=MAX_SIZE, description="Rank of the bias.")


class NoiseConfig(Strict):
    """Placeholders that are the target's own embeddings of random tokens, and no
    trained vectors (Uno, arXiv 2609.04010)."""

    low: int = Field(
        ge=0, le=MAX_SIZE, description="Least token id that they are drawn from."
    )
    high: int = Field(
        ge=1,
        le=MAX_SIZE,
        description="Ids are below this one; Uno calls it the mask token's id.",
    )
    token_ids: tuple[int, ...] = Field(
        min_length=1,
        max_length=MAX_SPECULATIVE_TOKENS - 1,
        description="The token of each placeholder, in order. The tensor holds their "
        "embeddings as they enter the target's first layer.",
    )

    @model_validator(mode="after")
    def _in_range(self) -> "NoiseConfig":
        if self.low >= self.high:
            raise ValueError(
                f"noise.low: got {self.low}, expected less than high ({self.high})"
            )
        if wrong := [i for i in self.token_ids if not self.low <= i < self.high]:
            raise ValueError(
                f"noise.token_ids: got {wrong[0]}, expected {self.low} to "
                f"{self.high - 1}"
            )
        return self


class DrafterConfig(Strict):
    """Everything that is to know of a drafter but its weights."""

    model_type: Literal["mtp_placeholder"] = Field(
        description="Marks the folder as one of ours."
    )
    format_version: Literal[1] = Field(description="Version of this format.")
    num_speculative_tokens: int = Field(
        ge=1,
        le=MAX_SPECULATIVE_TOKENS,
        description="Largest number of tokens drafted per step, the anchor's "
        "prediction included. Fewer may be asked for when serving.",
    )
    layers: tuple[LayerConfig, ...] = Field(
        min_length=1,
        max_length=MAX_LAYERS,
        description="The draft layers in the order they run.",
    )
    markov: MarkovConfig | None = Field(
        default=None, description="Markov correction, or null for none."
    )
    noise: NoiseConfig | None = Field(
        default=None,
        description="Tokens whose embeddings the placeholders are, or null for trained "
        "placeholders.",
    )
    draft_vocab_size: Annotated[int | None, Knob()] = Field(
        default=None,
        ge=1,
        description="Size of the reduced output vocabulary; null drafts over "
        "the target's whole vocabulary.",
    )
    prefix_window: Annotated[int | None, Knob()] = Field(
        default=None,
        ge=1,
        le=MAX_SIZE,
        description="Read only the first 128 tokens of a prefix and at least so many "
        "of the last (up to 127 more: what is left out is whole pieces of 128); null "
        "reads all of it.",
    )
    dtype: Annotated[DtypeName, Knob("bfloat16")] = Field(
        description="Type of every floating-point tensor of the checkpoint."
    )
    target: TargetFacts = Field(description="The target that it was made for.")

    @field_validator("format_version", mode="before")
    @classmethod
    def _is_integer(cls, value: Any) -> Any:
        # To a Literal, true and 1.0 are 1.
        return value if type(value) is int else repr(value)

    @model_validator(mode="after")
    def _fits_its_target(self) -> "DrafterConfig":
        for index, layer in enumerate(self.layers):
            _check_layer(index, layer, self.target)
        size, vocab = self.draft_vocab_size, self.target.vocab_size
        if size is not None and size > vocab:
            raise ValueError(
                f"draft_vocab_size: got {size}, the target's vocabulary has "
                f"{vocab} tokens; use a smaller size or null"
            )
        if self.noise is not None:
            _check_noise(self.noise, self.num_speculative_tokens - 1, vocab)
        return self

    @property
    def bound_layers(self) -> tuple[int, ...]:
        """Target layers whose KV is read, ascending and without repeats."""
        return tuple(sorted({layer.target_layer for layer in self.layers}))

    @property
    def shared_layers(self) -> tuple[int, ...]:
        """Target layers that the drafter runs, in the order it does."""
        return tuple(
            layer.target_layer
            for layer in self.layers
            if isinstance(layer, SharedLayerConfig)
        )

    @property
    def shares_whole_target(self) -> bool:
        """Whether the layers are the target's own, all of them and in order."""
        whole = tuple(range(self.target.num_hidden_layers))
        return len(self.layers) == len(whole) and self.shared_layers == whole

    @property
    def uses_boundary_hidden(self) -> bool:
        """Whether some layer reads the target's last hidden state."""
        return any(
            isinstance(layer, OwnLayerConfig) and layer.boundary_hidden
            for layer in self.layers
        )


def require_window(
    config: DrafterConfig, sliding_window: Callable[[int], int | None]
) -> None:
    """Raise unless layers with a sliding window read all of it, as the target did.

    Args:
        config: Of the drafter.
        sliding_window: Tokens that a target layer attends to; None for all.

    Raises:
        TargetMismatchError: ``prefix_window`` is shorter than one of them.
    """
    least = max(sliding_window(index) or 0 for index in config.bound_layers)
    if config.prefix_window is not None and config.prefix_window < least:
        raise TargetMismatchError(
            f"prefix_window: got {config.prefix_window}, but a target layer that the "
            f"drafter reads attends to the last {least} tokens; set it to {least} or "
            "more in the drafter's config.json, or to null"
        )


def _check_noise(noise: NoiseConfig, num_placeholders: int, vocab_size: int) -> None:
    if len(noise.token_ids) != num_placeholders:
        raise ValueError(
            f"noise.token_ids: got {len(noise.token_ids)} ids, expected "
            f"{num_placeholders}, one for each placeholder (num_speculative_tokens - 1)"
        )
    if noise.high > vocab_size:
        raise ValueError(
            f"noise.high: got {noise.high}, the target's vocabulary has {vocab_size} "
            "tokens; use that or less"
        )


def _check_layer(
    index: int, layer: SharedLayerConfig | OwnLayerConfig, target: TargetFacts
) -> None:
    last = target.num_hidden_layers - 1
    if layer.target_layer > last:
        raise ValueError(
            f"layers.{index}.target_layer: got {layer.target_layer}, the target "
            f"has layers 0 to {last}"
        )
    cached = target.cached_layers
    if cached is not None and layer.target_layer not in cached:
        raise ValueError(
            f"layers.{index}.target_layer: got {layer.target_layer}, which has no keys "
            f"and values per token to read; the target's layers {list(cached)} have"
        )
    lora = layer.lora if isinstance(layer, SharedLayerConfig) else None
    if lora and target.intermediate_size is None and MLP_LINEARS & set(lora.modules):
        raise ValueError(
            f"layers.{index}.lora.modules: {list(lora.modules)} names MLP modules, "
            "but target.intermediate_size is null (no dense MLP); name attention "
            "modules only"
        )
