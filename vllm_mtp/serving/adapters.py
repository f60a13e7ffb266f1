# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters on the target: drafts run on the weights below them.

vLLM puts a wrapper around each layer that an adapter can change, and tells its kernels
which adapter each row of the target's batch has. Of a draft's rows they know nothing.
So a drafter gets the target without the wrappers; verification has each request's own
adapter, and with it the answer.
"""

from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA, FusedMoEWithLoRA

from vllm_mtp.drafter.shadow import shadow
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.plugin import METHOD


def without_adapters(model: nn.Module) -> nn.Module:
    """The target with the layers that adapters can change as they are without one.

    Args:
        model: vLLM's target; left as it is, and what no adapter changes is shared.

    Raises:
        UnsupportedTargetError: Adapters can change experts, whose kernels vLLM
            replaces: below the wrapper they are no longer what they were.
    """
    bases: dict[str, nn.Module] = {}
    # One module can be at two places, such as a tied head.
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FusedMoEWithLoRA):
            raise UnsupportedTargetError(
                f"method {METHOD!r}: enable_lora: adapters could change the experts "
                f"of {path}, and drafts need them unchanged; give "
                "--lora-target-modules without experts, or serve without this method."
            )
        if isinstance(module, BaseLayerWithLoRA):
            bases[path] = module.base_layer
    return shadow(model, bases) if bases else model
