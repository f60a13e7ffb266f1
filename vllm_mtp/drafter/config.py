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

    def changed(self, *names: str) -> dict[str, Any]:
        """Those of some fields that are not what they are by default, with the
        default."""
        defaults = {name: type(self).model_fields[name].default for name in names}
        return {n: d for n, d in defaults.items() if getattr(self, n) != d}


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
    full_rank: tuple[LinearName, ...] = Field(
        default=(),
        description="Linear modules of which the placeholder rows have weights of "
        "their own, stored as the difference to the target's (Orthrus).",
    )

    @model_validator(mode="after")
    def _changed_once(self) -> "SharedLayerConfig":
        if len(set(self.full_rank)) != len(self.full_rank):
            raise ValueError(f"full_rank: named twice in {list(self.full_rank)}")
        if both := set(self.full_rank) & set(self.lora.modules if self.lora else ()):
            raise ValueError(f"full_rank: {sorted(both)} are in lora.modules too")
        return self


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
    boundary_of: Literal["last", "bound"] = Field(
        default="last",
        description="Which hidden state that is: the target's last one (or the mix of "
        "`boundary_layers`), or the stream behind the target layer that this one is "
        "bound to, which is not served yet.",
    )
    bridge: bool = Field(
        default=False,
        description="Whether the stream passes a linear map before the layer, in "
        "place of the target layers that are left out there.",
    )
    attention: Literal["prefix", "block"] = Field(
        default="prefix",
        description="What is attended to: the prefix in the bound layer's cache and "
        "the block, or the block alone. In the latter case the bound layer gives RoPE "
        "and the heads' shape, and no cache is read.",
    )
    per_position: bool = Field(
        default=False,
        description="Whether each position of the block has linear maps of its own. "
        "They are stored as one tensor, positions first.",
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
        if self.boundary_of == "bound" and not self.boundary_hidden:
            raise ValueError(
                "boundary_of: got 'bound', expected 'last' without boundary_hidden"
            )
        if self.per_position and (self.qkv_bias or self.o_bias):
            raise ValueError("per_position: got true, expected false with biases")
        return self


class MLPLayerConfig(Strict):
    """A layer without attention, which reads no cache."""

    kind: Literal["mlp"] = Field(
        default="mlp", description="A layer without attention."
    )
    form: Literal["gated", "plain", "square"] = Field(
        description="What is added to the stream. gated: RMSNorm and SwiGLU; plain: "
        "two linear maps with biases and ReLU between them (blockwise parallel "
        "decoding); square: one linear map with a bias, and SiLU (Medusa).",
    )
    intermediate_size: int | None = Field(
        default=None,
        ge=1,
        le=MAX_SIZE,
        description="Width between its linear maps; null for square.",
    )
    rms_norm_eps: float | None = Field(
        default=None, gt=0, le=1, description="Epsilon of its norm; null if not gated."
    )
    per_position: bool = Field(
        default=False,
        description="Whether each position of the block has weights of its own. They "
        "are stored as one tensor, positions first.",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> "MLPLayerConfig":
        for name, wanted in (
            ("intermediate_size", self.form != "square"),
            ("rms_norm_eps", self.form == "gated"),
        ):
            value = getattr(self, name)
            if (value is None) == wanted:
                expected = "a number" if wanted else "null"
                raise ValueError(
                    f"{name}: got {_shown(value)}, expected {expected} where form is "
                    f"{self.form!r}"
                )
        return self


LayerConfig = Annotated[
    SharedLayerConfig | OwnLayerConfig | MLPLayerConfig, Field(discriminator="kind")
]
BoundLayerConfig = SharedLayerConfig | OwnLayerConfig
"""A layer that refers to a target layer."""


def needs_blocks(layer: SharedLayerConfig | OwnLayerConfig | MLPLayerConfig) -> bool:
    """Whether a layer computes something else for rows of other blocks or positions."""
    if isinstance(layer, SharedLayerConfig):
        return False
    attends = isinstance(layer, OwnLayerConfig) and layer.attention == "block"
    return layer.per_position or attends


class ChainConfig(Strict):
    """Rows that run one after the other, each on the token drafted before it and on the
    last hidden state behind it, in place of a block at once (DeepSeek-V3)."""

    rms_norm_eps: float = Field(
        gt=0, le=1, description="Epsilon of the norms of token and hidden state."
    )


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
    chain: ChainConfig | None = Field(
        default=None,
        description="Positions one after the other, or null for all of them at once.",
    )
    input: Annotated[Literal["block", "boundary"], Knob()] = Field(
        default="block",
        description="What enters the first layer: the block (the anchor's embedding "
        "and the placeholders), or at every position the target's last hidden state "
        "at the last position of the prefix, as in heads. Behind MLP layers alone it "
        "then goes to the LM head as it is, since it has passed the final norm.",
    )
    block_mask: Annotated[Literal["causal", "bidirectional"], Knob()] = Field(
        default="causal",
        description="Which rows of its own block a row attends to: those before it "
        "and itself, or all. In the latter case fewer draft tokens are other ones: the "
        "rows left out were read.",
    )
    lm_head: Annotated[Literal["target", "own"], Knob()] = Field(
        default="target",
        description="What makes logits of hidden states: the target's LM head, or one "
        "of the drafter's for each position (Medusa).",
    )
    extra_rows: Annotated[int, Knob()] = Field(
        default=0,
        ge=0,
        le=MAX_SPECULATIVE_TOKENS,
        description="Trained rows between the anchor and the placeholders, which "
        "predict nothing and are read by what stands behind them. Not served yet.",
    )
    boundary_layers: tuple[int, ...] = Field(
        default=(),
        max_length=MAX_LAYERS,
        description="Take for the boundary hidden state a learnt mix of the streams "
        "behind these target layers; empty for the target's last hidden state. Not "
        "served yet.",
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
            if not isinstance(layer, MLPLayerConfig):
                _check_layer(index, layer, self.target)
        size, vocab = self.draft_vocab_size, self.target.vocab_size
        if size is not None and size > vocab:
            raise ValueError(
                f"draft_vocab_size: got {size}, the target's vocabulary has "
                f"{vocab} tokens; use a smaller size or null"
            )
        _check_boundary_layers(self.boundary_layers, self)
        _check_input(self)
        if self.chain is not None:
            _check_chain(self)
        if self.noise is not None:
            _check_noise(self.noise, self.num_placeholders, vocab)
        return self

    @property
    def bound_layers(self) -> tuple[int, ...]:
        """Target layers that some layer refers to, ascending and without repeats."""
        bound = (x for x in self.layers if not isinstance(x, MLPLayerConfig))
        return tuple(sorted({layer.target_layer for layer in bound}))

    @property
    def read_layers(self) -> tuple[int, ...]:
        """Those of the bound layers whose KV is read."""
        return tuple(sorted({x.target_layer for x in self.readers}))

    @property
    def readers(self) -> tuple[BoundLayerConfig, ...]:
        """The layers that read the KV cache of the target layer they are bound to."""
        return tuple(
            layer
            for layer in self.layers
            if isinstance(layer, SharedLayerConfig)
            or (isinstance(layer, OwnLayerConfig) and layer.attention == "prefix")
        )

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
        """Whether the drafter reads hidden states of the target."""
        return bool(self.boundary_sources)

    @property
    def boundary_sources(self) -> tuple[int, ...]:
        """The target layers behind which hidden states are read, in the order in which
        `BoundDrafter` takes them; `LAST_HIDDEN` for the target's last one."""
        sources = self.boundary_layers or (LAST_HIDDEN,)
        if not self.reads_last_boundary:
            sources = ()
        bound = (x.target_layer for x in self._boundary_readers("bound"))
        return tuple(dict.fromkeys([*sources, *bound]))

    def _boundary_readers(self, of: str) -> list[OwnLayerConfig]:
        return [
            layer
            for layer in self.layers
            if isinstance(layer, OwnLayerConfig)
            and layer.boundary_hidden
            and layer.boundary_of == of
        ]

    @property
    def reads_last_boundary(self) -> bool:
        """Whether it reads the target's last hidden state, or the mix that stands in
        its place."""
        return (
            self.input == "boundary"
            or self.chain is not None
            or bool(self._boundary_readers("last"))
        )

    @property
    def num_draftable_tokens(self) -> int:
        """Tokens that can be drafted: the reduced vocabulary, or the target's."""
        return self.draft_vocab_size or self.target.vocab_size

    @property
    def unserved(self) -> dict[str, tuple[Any, Any]]:
        """Keys by which vLLM cannot run it yet: what they are, and would have to be.
        Plain torch trains and evaluates such drafters."""
        found: dict[str, tuple[Any, Any]] = {}
        if self.extra_rows:
            found["extra_rows"] = (self.extra_rows, 0)
        if self.boundary_layers:
            found["boundary_layers"] = (list(self.boundary_layers), [])
        if self._boundary_readers("bound"):
            found["boundary_of"] = ("bound", "last")
        return found

    @property
    def are_heads(self) -> bool:
        """Whether it is made of heads on a hidden state."""
        plain = all(isinstance(layer, MLPLayerConfig) for layer in self.layers)
        return self.input == "boundary" and plain

    @property
    def num_placeholders(self) -> int:
        """Trained rows that ask for tokens."""
        parallel = self.chain is None and self.input == "block"
        return self.num_speculative_tokens - 1 if parallel else 0


LAST_HIDDEN = -1
"""In `DrafterConfig.boundary_sources`: behind the final norm."""


def require_window(
    config: DrafterConfig, sliding_window: Callable[[int], int | None]
) -> None:
    """Raise unless layers with a sliding window read all of it, as the target did.

    Args:
        config: Of the drafter.
        sliding_window: Tokens that a target layer attends to; None for all.

    Raises:
        TargetMismatchError: ``prefix_window`` is shorter than one of them, or the rows
            of a block are not one after the other, as such a window counts them.
    """
    windows = [sliding_window(index) or 0 for index in config.read_layers]
    least = max(windows, default=0)
    unusual = config.changed("block_mask", "extra_rows") if least else {}
    for name, plain in unusual.items():
        raise TargetMismatchError(
            f"{name}: got {getattr(config, name)!r}, but a target layer that the "
            f"drafter reads has a sliding window ({least} tokens); expected {plain!r}, "
            "or layers without one"
        )
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


def _check_boundary_layers(layers: tuple[int, ...], config: DrafterConfig) -> None:
    last = config.target.num_hidden_layers - 1
    if wrong := [i for i in layers if not 0 <= i <= last]:
        raise ValueError(
            f"boundary_layers: got {wrong[0]}, the target has layers 0 to {last}"
        )
    if len(set(layers)) != len(layers):
        raise ValueError(f"boundary_layers: named twice in {list(layers)}")
    if layers and not config.reads_last_boundary:
        raise ValueError(
            f"boundary_layers: got {list(layers)}, but nothing reads their mix; set "
            "boundary_hidden of a layer (with boundary_of 'last'), input or chain"
        )


def _check_input(config: DrafterConfig) -> None:
    """Refuse what does not go with rows that are all the boundary hidden state, or with
    rows in between."""
    alike = [layer for layer in config.layers if getattr(layer, "per_position", False)]
    if config.extra_rows and (alike or config.lm_head == "own"):
        raise ValueError(
            f"extra_rows: got {config.extra_rows}, expected 0 with per_position or an "
            "own lm_head, which have weights for positions alone"
        )
    if config.input == "block":
        return
    for name in ("noise", "chain", "extra_rows"):
        if value := getattr(config, name):
            raise ValueError(
                f"{name}: got {_shown(value)}, which does not go with input 'boundary'"
            )
    told_apart = alike or config.lm_head == "own" or config.markov is not None
    # Attention to the block alone finds the same values in every row.
    if config.num_speculative_tokens > 1 and not (told_apart or config.readers):
        raise ValueError(
            "input: got 'boundary', with which all positions would draft the same; "
            "expected per_position in a layer, lm_head 'own', or a layer that reads "
            "the prefix"
        )


def _shown(value: object) -> str:
    """A value of a config in a line, as JSON has it where that is short."""
    if isinstance(value, Strict):
        return "an object"
    return "null" if value is None else repr(value)


def _check_chain(config: DrafterConfig) -> None:
    parallel = ("markov", "noise", "extra_rows", "block_mask", "lm_head")
    for name, expected in config.changed(*parallel).items():
        raise ValueError(
            f"{name}: got {_shown(getattr(config, name))}, expected "
            f"{_shown(expected)} where chain is not null"
        )
    read: set[int] = set()
    for index, layer in enumerate(config.layers):
        if isinstance(layer, OwnLayerConfig) and layer.attention == "block":
            raise ValueError(
                f"layers.{index}.attention: got 'block', expected 'prefix' where chain "
                "is not null"
            )
        if isinstance(layer, MLPLayerConfig):
            continue
        if layer.target_layer in read:
            raise ValueError(
                f"layers.{index}.target_layer: got {layer.target_layer} again; where "
                "chain is not null, each layer needs a cache of its own for the rows "
                "before"
            )
        read.add(layer.target_layer)


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
    if not isinstance(layer, SharedLayerConfig) or target.intermediate_size is not None:
        return
    lora = layer.lora.modules if layer.lora else ()
    for key, modules in (("lora.modules", lora), ("full_rank", layer.full_rank)):
        if MLP_LINEARS & set(modules):
            raise ValueError(
                f"layers.{index}.{key}: {list(modules)} names MLP modules, but "
                "target.intermediate_size is null (no dense MLP); name attention "
                "modules only"
            )
