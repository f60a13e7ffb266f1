# SPDX-License-Identifier: Apache-2.0
"""Run a target's module with some submodules replaced, without touching it.

A shadow is a copy of the module tree's containers along the replaced paths; all
other modules, and every weight, are the original objects. So the frozen layer
exists once in memory, and its own forward never sees the replacement.
"""

import copy
from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn

from vllm_mtp.errors import UnsupportedTargetError


def shadow(module: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """Copy ``module``'s containers and put ``replacements`` in place.

    Args:
        module: The original; left as it is.
        replacements: Submodule path (``self_attn.q_proj``) to its stand-in.

    Raises:
        UnsupportedTargetError: The module's ``forward`` was replaced on the
            instance, by others than accelerate, so a copy would not be used.
    """
    if "" in replacements:
        return replacements[""]
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    for child in {path.partition(".")[0] for path in replacements}:
        clone._modules[child] = shadow(
            module.get_submodule(child), _below(child, replacements)
        )
    if (hook := vars(module).get("_hf_hook")) is not None:
        return _hooked(clone, hook)
    forward = vars(module).get("forward")
    # A method of the module itself, as vLLM's fusions of transformers' modules are, can
    # be one of the copy as well.
    method = forward if isinstance(forward, MethodType) else None
    if forward is not None and (method is None or method.__self__ is not module):
        raise UnsupportedTargetError(
            f"{type(module).__name__} has a patched forward, of another package than "
            "accelerate; LoRA on shared layers needs an unpatched target"
        )
    if method is not None:
        clone.forward = MethodType(method.__func__, clone)
    return clone


def _hooked(clone: nn.Module, hook: Any) -> nn.Module:
    """A copy of a module that accelerate has put on a device, with the same hook: it
    brings what the module is given there."""
    from accelerate.hooks import add_hook_to_module  # type: ignore[import-untyped]

    # They would run the original.
    for name in ("_hf_hook", "_old_forward", "forward"):
        del vars(clone)[name]
    return add_hook_to_module(clone, copy.copy(hook))


def _below(child: str, replacements: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {
        path.removeprefix(child).removeprefix("."): stand_in
        for path, stand_in in replacements.items()
        if path.partition(".")[0] == child
    }
