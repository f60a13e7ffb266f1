# SPDX-License-Identifier: Apache-2.0
"""Run a target's module with some submodules replaced, without touching it.

A shadow is a copy of the module tree's containers along the replaced paths; all
other modules, and every weight, are the original objects. So the frozen layer
exists once in memory, and its own forward never sees the replacement.
"""

import copy
from collections.abc import Mapping
from types import MethodType

from torch import nn

from vllm_mtp.errors import UnsupportedTargetError


def shadow(module: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """Copy ``module``'s containers and put ``replacements`` in place.

    Args:
        module: The original; left as it is.
        replacements: Submodule path (``self_attn.q_proj``) to its stand-in.

    Raises:
        UnsupportedTargetError: The module's ``forward`` was replaced on the
            instance (as accelerate's hooks do), so a copy would not be used.
    """
    if "" in replacements:
        return replacements[""]
    forward = vars(module).get("forward")
    # A method of the module itself, as vLLM's fusions of transformers' modules are, can
    # be one of the copy as well.
    method = forward if isinstance(forward, MethodType) else None
    if forward is not None and (method is None or method.__self__ is not module):
        raise UnsupportedTargetError(
            f"{type(module).__name__} has a patched forward (an accelerate device "
            "map?); LoRA on shared layers needs an unpatched target. Load it "
            "without device_map."
        )
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    if method is not None:
        clone.forward = MethodType(method.__func__, clone)
    for child in {path.partition(".")[0] for path in replacements}:
        clone._modules[child] = shadow(
            module.get_submodule(child), _below(child, replacements)
        )
    return clone


def _below(child: str, replacements: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {
        path.removeprefix(child).removeprefix("."): stand_in
        for path, stand_in in replacements.items()
        if path.partition(".")[0] == child
    }
