# SPDX-License-Identifier: Apache-2.0
"""Products with the drafter's own weights, by the kernels that vLLM gives the target.

On a CPU these are oneDNN's with weights laid out once (or SGLang's). torch's
``linear`` lays a float32 weight out anew at every call with two rows or more, which
takes as long again as reading it (docs/benchmark.md). On GPUs nothing changes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.utils import (
    dispatch_cpu_unquantized_gemm,
    dispatch_unquantized_gemm,
)
from vllm.platforms import current_platform


def use_vllm_kernels(module: nn.Module) -> None:
    """Let every ``nn.Linear`` in ``module`` compute by `product_with`.

    The weights must not change afterwards: on a CPU the kernel has a copy of them.
    """
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            linear.forward = product_with(linear)  # type: ignore


def product_with(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """``[rows, in]`` to ``[rows, out]``, by the kernel that vLLM takes for the layer.

    Args:
        layer: Has ``weight`` ``[out, in]`` and, if any, ``bias`` ``[out]``. On a CPU
            the weight is laid out here, as vLLM does after loading its own.
    """
    if current_platform.is_cpu():
        # Kept, since `vllm-mtp check` and tensor parallelism look at it.
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    bias = getattr(layer, "bias", None)
    # Chosen once, and not for every product of every draft.
    kernel = dispatch_unquantized_gemm()
    return partial(kernel, layer, weight=layer.weight, bias=bias)
