# SPDX-License-Identifier: Apache-2.0
"""What a new drafter is to be: flags of `init` and `train`, and keys of a YAML file.

How to add a knob. A plain value of the whole drafter, such as a number, needs

1. a field in `DrafterConfig`, with limits, a description and the mark `Knob`;
2. the code that does what it says;
3. ``python checkpoints_spec/generate.py``, which writes it into format and schema.

Its flag, its YAML key, its help, its limits and its way into a new drafter's config
follow. A field of a part (a layer, LoRA) needs a flag below as well, since it is not
said of each layer on its own.
"""

from dataclasses import dataclass, make_dataclass
from typing import Any, Literal

from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo

from vllm_mtp.drafter.config import (
    ChainConfig,
    DrafterConfig,
    Knob,
    LoRAConfig,
    MarkovConfig,
    MLPLayerConfig,
    NoiseConfig,
    OwnLayerConfig,
    SharedLayerConfig,
    Strict,
)
from vllm_mtp.drafter.noise import draw_noise_config
from vllm_mtp.drafter.target_facts import MAX_SIZE
from vllm_mtp.errors import MTPError, refusal_of
from vllm_mtp.flags import flag

_KNOBS = {
    name: (info, knob)
    for name, info in DrafterConfig.model_fields.items()
    for knob in info.metadata
    if isinstance(knob, Knob)
}


def help_of(model: type[BaseModel], name: str) -> str:
    """The description of a config's field, as the help of a flag."""
    text = (model.model_fields[name].description or "").removesuffix(".")
    return text[0].lower() + text[1:]


def _can_be_null(info: FieldInfo) -> bool:
    return not info.is_required() and info.default is None


def _flag_of(name: str, info: FieldInfo, knob: Knob) -> Any:
    text = help_of(DrafterConfig, name) + " (0: null)" * _can_be_null(info)
    return flag(text, knob.default if info.is_required() else info.default)


_Knobs: Any = make_dataclass(
    "_Knobs",
    [
        (name, info.annotation, _flag_of(name, info, knob))
        for name, (info, knob) in _KNOBS.items()
    ],
    kw_only=True,
)
_LIMITED = {
    name: (info.annotation, info)
    for name, info in DrafterConfig.model_fields.items()
    if name == "num_speculative_tokens" or name in _KNOBS
}
_NOISE_LOW = 1  # default
_Limits: Any = create_model("_Limits", __base__=Strict, **_LIMITED)  # type: ignore[call-overload]


@dataclass(kw_only=True)
class DrafterOptions(_Knobs):
    """What can be chosen about a new drafter besides its layers and its positions.

    Also has a field for every knob of `DrafterConfig`: ``dtype``,
    ``draft_vocab_size``, ``prefix_window``. Where None is possible, 0 means it too,
    since a flag cannot say None.
    """

    own_init: Literal["copy", "random"] = flag(
        "start of own layers: a copy of the target's layer, or random", "copy"
    )
    boundary_hidden: Literal["none", "first", "all"] = flag(
        "own layers for which this holds: "
        + help_of(OwnLayerConfig, "boundary_hidden"),
        "none",
    )
    boundary_init: Literal["zero", "identity"] = flag(
        "start of that projection", "zero"
    )
    boundary_of: Literal["last", "bound"] = flag(
        "for these layers: " + help_of(OwnLayerConfig, "boundary_of"), "last"
    )
    boundary_layers: list[int] = flag(help_of(DrafterConfig, "boundary_layers"), [])
    bridges: bool = flag(
        "for all own layers: " + help_of(OwnLayerConfig, "bridge"), False
    )
    own_attention: Literal["prefix", "block"] = flag(
        "for all own layers: " + help_of(OwnLayerConfig, "attention"), "prefix"
    )
    per_position: bool = flag(
        "for all own and MLP layers: " + help_of(OwnLayerConfig, "per_position"), False
    )
    mlp_form: Literal["gated", "plain", "square"] = flag(
        "for all MLP layers: " + help_of(MLPLayerConfig, "form"), "gated"
    )
    mlp_size: int | None = flag(
        "width between the linear maps of all MLP layers; none where their form is "
        "square (default: the target's)",
        None,
    )
    chain: bool = flag(
        "draft positions one after the other, each from the token drafted before it "
        "and the hidden state behind that, in place of all at once (DeepSeek-V3)",
        False,
    )
    full_rank_modules: list[str] = flag(
        "for all shared layers: " + help_of(SharedLayerConfig, "full_rank"), []
    )
    lora_rank: int | None = flag(
        help_of(LoRAConfig, "rank") + ", on shared layers (0: no LoRA)", None
    )
    lora_alpha: float | None = flag(
        help_of(LoRAConfig, "alpha") + " (default: twice the rank)", None
    )
    lora_modules: list[str] = flag(
        help_of(LoRAConfig, "modules"), ["q_proj", "v_proj", "o_proj"]
    )
    markov_rank: int | None = flag(
        help_of(MarkovConfig, "rank") + " on a position's logits from the token "
        "drafted before it (0: none)",
        None,
    )
    placeholder_kind: Literal["trained", "noise"] = flag(
        "trained vectors, or noise: the target's embeddings of random tokens (Uno), "
        "which training draws anew for every block",
        "trained",
    )
    noise_low: int = flag("least id of these tokens", _NOISE_LOW)
    mask_token_id: int | None = flag(
        "their ids are below this one (default: the target's vocabulary size)", None
    )
    seed: int = flag("seed of the random start values", 0)

    def knobs(self) -> dict[str, Any]:
        """What the config's knobs are set to."""
        return {
            name: (getattr(self, name) or None)
            if _can_be_null(info)
            else getattr(self, name)
            for name, (info, _) in _KNOBS.items()
        }

    def lora_config(self) -> LoRAConfig | None:
        """The LoRA that is asked for; raises as `require_valid`."""
        if not self.lora_rank:
            return None
        alpha = self.lora_alpha or 2.0 * self.lora_rank
        return valid(
            LoRAConfig,
            "lora_",
            rank=self.lora_rank,
            alpha=alpha,
            modules=tuple(self.lora_modules),
        )

    def markov_config(self) -> MarkovConfig | None:
        """The correction that is asked for; raises as `require_valid`."""
        rank = self.markov_rank
        return valid(MarkovConfig, "markov_", rank=rank) if rank else None

    def chain_config(self, rms_norm_eps: float) -> ChainConfig | None:
        """The chain, if it is asked for."""
        return ChainConfig(rms_norm_eps=rms_norm_eps) if self.chain else None

    def shared_layer(self, target_layer: int) -> SharedLayerConfig:
        """A shared layer as it is asked for; raises as `require_valid`."""
        return valid(
            SharedLayerConfig,
            "",
            target_layer=target_layer,
            lora=self.lora_config(),
            full_rank=tuple(self.full_rank_modules),
        )

    def mlp_layer(self, intermediate_size: int, rms_norm_eps: float) -> MLPLayerConfig:
        """A layer without attention as it is asked for.

        Args:
            intermediate_size: The target's.
            rms_norm_eps: The target's.
        """
        size = self.mlp_size or intermediate_size
        return valid(
            MLPLayerConfig,
            "mlp_",
            form=self.mlp_form,
            intermediate_size=None if self.mlp_form == "square" else size,
            rms_norm_eps=rms_norm_eps if self.mlp_form == "gated" else None,
            per_position=self.per_position,
        )

    def noise_config(self, count: int, vocab_size: int) -> NoiseConfig | None:
        """The noise tokens of ``count`` placeholders, if they are asked for.

        Raises:
            MTPError: Names the limit that is out of the target's vocabulary.
        """
        if self.placeholder_kind == "trained" or not count:
            return None
        high = self._noise_high(vocab_size)
        require_noise_range(self.noise_low, high, vocab_size)
        return draw_noise_config(self.noise_low, high, count, self.seed)

    def _noise_high(self, vocab_size: int) -> int:
        return vocab_size if self.mask_token_id is None else self.mask_token_id

    def require_valid(self, num_speculative_tokens: int) -> None:
        """Hold every value to the limits of the config's fields.

        Raises:
            MTPError: Names the first that is out of them.
        """
        k = num_speculative_tokens
        valid(_Limits, "", num_speculative_tokens=k, **self.knobs())
        self.shared_layer(0)
        self.mlp_layer(1, 1e-6)
        self.markov_config()
        if self.mlp_form == "square" and self.mlp_size:
            raise MTPError(
                f"mlp_size: got {self.mlp_size}, but mlp_form is 'square', which is as "
                "wide as the target; leave mlp_size out"
            )
        if self.boundary_of == "bound" and self.boundary_hidden == "none":
            raise MTPError(
                "boundary_of: got 'bound', but boundary_hidden is 'none'; write first "
                "or all there, or leave boundary_of out"
            )
        if self.placeholder_kind == "trained":
            for name, default in (("mask_token_id", None), ("noise_low", _NOISE_LOW)):
                if (value := getattr(self, name)) != default:
                    raise MTPError(
                        f"{name}: got {value}, but placeholder_kind is 'trained'; "
                        f"write noise there, or leave {name} out"
                    )
        # With a limit of the vocabulary alone, which is not known yet.
        require_noise_range(self.noise_low, self._noise_high(MAX_SIZE), MAX_SIZE)


def require_noise_range(low: int, high: int, vocab_size: int) -> None:
    """Refuse a range of noise tokens that the target's vocabulary does not have.

    Raises:
        MTPError: Names the limit.
    """
    if not 0 < high <= vocab_size:
        raise MTPError(
            f"mask_token_id: got {high}, expected 1 to {vocab_size}, the size of the "
            "target's vocabulary"
        )
    if not 0 <= low < high:
        raise MTPError(f"noise_low: got {low}, expected 0 to {high - 1}")


def valid(model: type[Any], prefix: str, **values: Any) -> Any:
    """A config of some values.

    Args:
        model: The config's class.
        prefix: Of the keys in the error.
        values: Of its fields.

    Raises:
        MTPError: Says what is wrong, in one line.
    """
    try:
        return model(**values)
    except ValidationError as error:
        raise MTPError(refusal_of(error, prefix)) from None
