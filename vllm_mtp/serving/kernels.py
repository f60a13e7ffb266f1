# SPDX-License-Identifier: Apache-2.0
"""Products with the drafter's own weights, by the kernels that vLLM gives the target.

On a CPU these are oneDNN's with weights laid out once (or SGLang's). torch's
``linear`` lays a float32 weight out anew at every call with two rows or more, which
takes as long again as reading it (docs/benchmark.md). On GPUs nothing changes.
"""

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
    """Let every ``nn.Linear`` in ``module`` compute by `product`.

    The weights must not change afterwards: on a CPU the kernel has a copy of them.
    """
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            prepare(linear)
            linear.forward = partial(product, linear)  # type: ignore[method-assign]


def prepare(layer: Any) -> None:
    """Lay a layer's ``weight`` out for `product`, as vLLM does after loading its own.

    Args:
        layer: Has ``weight`` ``[out, in]`` and, if any, ``bias`` ``[out]``.
    """
    if current_platform.is_cpu():
        # Kept, since `vllm-mtp check` and tensor parallelism look at it.
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    # Chosen once, and not for every product of every draft.
    layer.kernel = dispatch_unquantized_gemm()


def product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """``[rows, in]`` to ``[rows, out]``, for a layer that was prepared."""
    return layer.kernel(layer, x, layer.weight, getattr(layer, "bias", None))
