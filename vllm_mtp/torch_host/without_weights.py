# SPDX-License-Identifier: Apache-2.0
"""A target and a new drafter of which only the config is there: sizes, no numbers."""

from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from transformers.initialization import no_init_weights

from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.options import DrafterOptions
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.errors import UnsupportedTargetError, in_one_line
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.layer_copy import readings
from vllm_mtp.torch_host.load import class_of, decoder_of
from vllm_mtp.torch_host.new_drafter import bind_layers, new_config, own_layers

# Of the small model that the ways of a family are learnt from.
_SMALL_HEAD, _SMALL_MLP, _SMALL_VOCABULARY = 8, 64, 256


class BareTarget:
    """A target of which only the config is there.

    Args:
        config: transformers' config, whole.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    @cached_property
    def model(self) -> Any:
        """transformers' model, with shapes alone.

        Raises:
            UnsupportedTargetError: transformers cannot build it.
        """
        try:
            with torch.device("meta"), no_init_weights():
                return class_of(self.config).from_config(self.config)
        except Exception as error:  # of the model's own code
            raise UnsupportedTargetError(
                f"target {self.config.model_type!r}: transformers cannot build a model "
                f"from its config ({in_one_line(error, 300)}); repair its "
                "config.json"
            ) from None


def drafter_config(
    target: BareTarget,
    layers: str,
    num_speculative_tokens: int,
    options: DrafterOptions,
) -> DrafterConfig:
    """The config that `new_drafter` would give.

    Own layers get the most usual form that a copy could have: which one is right takes
    the weights to see, and the forms differ by a few vectors.

    Args:
        target: The target.
        layers: The layer list.
        num_speculative_tokens: k.
        options: Everything else.

    Raises:
        MTPError: As `new_drafter`.
    """
    options.require_valid(num_speculative_tokens)
    facts = TargetFacts.from_hf_config(target.config)
    text = target.config.get_text_config()
    bound = bind_layers(layers, text)
    own = own_layers(bound)
    forms = {}
    if own and options.own_init == "copy":
        decoder = decoder_of(target.model)
        for index in sorted(own):
            weights = decoder.layers[index].state_dict()
            forms[index] = next(readings(weights, text, facts.of_layer(index))).form
    return new_config(
        text, facts, bound, num_speculative_tokens, options, forms, **options.knobs()
    )


def small_host(hf_config: Any) -> HFTarget:
    """A host of a small random model of the same family, with as many layers and heads.

    Args:
        hf_config: Of the model it stands for, whole.

    Raises:
        UnsupportedTargetError: No such model can be made, or it is not followed.
    """
    try:
        small = deepcopy(hf_config)
        text = small.get_text_config()
        text.hidden_size = text.num_attention_heads * _SMALL_HEAD
        if getattr(text, "head_dim", None) is not None:
            text.head_dim = _SMALL_HEAD
        text.intermediate_size = _SMALL_MLP
        text.vocab_size = _SMALL_VOCABULARY
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(text, name, None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = class_of(small).from_config(small, dtype=torch.float32)
        return HFTarget(model.eval().requires_grad_(False))
    except Exception as error:  # of the config's and the model's own code
        raise UnsupportedTargetError(
            f"target {hf_config.model_type!r}: no small model of its family can be "
            "made, to learn from how its layers are called "
            f"({in_one_line(error, 300)}); leave --trace out"
        ) from None
