# SPDX-License-Identifier: Apache-2.0
"""The linear modules of a target's layers, by their paths in transformers' model."""

from typing import Any, NamedTuple

import torch
from torch import nn

from vllm_mtp.torch_host.load import class_of, decoder_of


class LinearModule(NamedTuple):
    """A linear module of a decoder layer."""

    layer: int
    path: str  # from the layer on, such as self_attn.q_proj
    sizes: tuple[int, int]  # inputs, outputs


class LinearModules(NamedTuple):
    """Those of all decoder layers.

    Attributes:
        root: Path of the decoder in the whole model, with a dot behind it; such as
            ``model.`` or ``model.language_model.``.
        modules: In the order that they have in the model.
        elsewhere: Last names of the linear modules outside of the decoder layers.
    """

    root: str
    modules: tuple[LinearModule, ...]
    elsewhere: frozenset[str]


def linear_modules(hf_config: Any) -> LinearModules:
    """Look at the model without its weights.

    Args:
        hf_config: The target's, whole.
    """
    with torch.device("meta"):
        model = class_of(hf_config).from_config(hf_config)
    decoder = decoder_of(model)
    names = {
        module: name
        for name, module in model.named_modules()
        if module is decoder or isinstance(module, nn.Linear)
    }
    root = names.pop(decoder)
    found = tuple(
        LinearModule(index, path, (module.in_features, module.out_features))
        for index, layer in enumerate(decoder.layers)
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear) and names.pop(module)
    )
    elsewhere = frozenset(name.rpartition(".")[2] for name in names.values())
    return LinearModules(f"{root}." if root else "", found, elsewhere)
