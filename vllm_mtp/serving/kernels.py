# SPDX-License-Identifier: Apache-2.0
"""Products with the drafter's own weights, by kernels that vLLM brings along.

On a CPU a draft waits for weights, so where the CPU multiplies 8-bit integers it reads
them as such: a scale for each output of the weight, and one for each row of the input,
found as it comes (vLLM's own W8A8 scheme). Drafts are verified, so what that rounds
costs acceptance at most, and none that could be measured (docs/benchmark.md). Other
CPUs use vLLM's ordinary kernels, with weights laid out once; torch's ``linear`` lays a
float32 weight out anew at every call. On GPUs nothing changes.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.model_executor.layers.utils import (
    dispatch_cpu_unquantized_gemm,
    dispatch_unquantized_gemm,
)
from vllm.platforms import current_platform

from vllm_mtp.drafter.heads import OwnHeads
from vllm_mtp.drafter.layers import BlockRows, PositionLinear
from vllm_mtp.drafter.lora import GatedLinear, Product
from vllm_mtp.plugin import METHOD

logger = logging.getLogger("vllm.mtp_placeholder")

_INT8_MAX = 127
_CLOSE = 0.05  # of the product's length; 8 bits leave about 0.01
# Smaller weights are read so fast that rounding them gains nothing.
_LEAST_FOR_AMX = 1 << 16
# Without AMX, to quantise the rows costs more than all but an LM head gains.
_LEAST_FOR_VNNI = 1 << 22


def use_vllm_kernels(module: nn.Module) -> None:
    """Let every linear map in ``module`` compute by `product_with`.

    Call it again when weights have changed: on a CPU the kernel has a copy of them.
    """
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            linear.forward = product_with(linear)  # type: ignore
        elif not current_platform.is_cpu():
            continue  # one batched product takes fewer launches
        elif isinstance(linear, PositionLinear):
            linear.forward = _by_position(linear.weight, linear.bias)  # type: ignore
        elif isinstance(linear, OwnHeads):
            linear.forward = _heads_by_position(linear.weight)  # type: ignore


def merge_changes(linears: Iterable[GatedLinear]) -> None:
    """Let the changes of each of the target's modules compute by vLLM's kernels, the
    low-rank pairs of a module as one.

    A pair is so small that a call takes longer than its products: where a layer has
    seven, they take as long as the layer itself. Call it again when weights have
    changed.
    """
    if not current_platform.is_cpu():
        return  # this copies weights, and on a GPU these can be large
    for linear in linears:
        linear.merge(lambda weight: _in_its_type(_frozen_linear(weight)))


def _by_position(
    weights: torch.Tensor, biases: torch.Tensor | None
) -> Callable[[torch.Tensor, BlockRows], torch.Tensor]:
    """As `PositionLinear.forward`, a product for each position."""
    products = _products(weights, biases)

    def forward(x: torch.Tensor, rows: BlockRows) -> torch.Tensor:
        some = products[rows.first : rows.first + rows.num_positions]
        return _each(some, rows.by_block(x)).flatten(0, 1)

    return forward


def _heads_by_position(weights: torch.Tensor) -> Callable[..., torch.Tensor]:
    """As `OwnHeads.forward` without columns, which serving never asks for."""
    products = _products(weights, None)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return _each(products[: hidden.shape[1]], hidden)

    return forward


def _each(products: Sequence[Product], blocks: torch.Tensor) -> torch.Tensor:
    """As `layers.each_position`."""
    if len(products) == 1:
        return products[0](blocks[:, 0])[:, None]
    rows = zip(products, blocks.unbind(1), strict=True)
    return torch.stack([product(row.contiguous()) for product, row in rows], dim=1)


def _products(weights: torch.Tensor, biases: torch.Tensor | None) -> list[Product]:
    """Of weights ``[positions, out, in]`` and biases ``[positions, out]``."""
    each = [None] * len(weights) if biases is None else biases.detach()
    pairs = zip(weights.detach(), each, strict=True)
    return [product_with(_frozen_linear(weight, bias)) for weight, bias in pairs]


def _frozen_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def product_with(layer: Any) -> Product:
    """``[rows, in]`` to ``[rows, out]``, by the fastest kernel for the layer.

    Args:
        layer: Has ``weight`` ``[out, in]`` and, if any, ``bias`` ``[out]``. On a CPU
            the weight is laid out here, as vLLM does after loading its own. It is
            kept, since `vllm-mtp check` and tensor parallelism look at it.
    """
    if current_platform.is_cpu():
        product = int8_product(layer.weight, getattr(layer, "bias", None))
        if product is not None:
            return product
    return _in_its_type(layer)


def _in_its_type(layer: Any) -> Product:
    """As `product_with`, in the weight's own type."""
    if current_platform.is_cpu():
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    # Chosen once, and not for every product of every draft.
    kernel = dispatch_unquantized_gemm()
    bias = getattr(layer, "bias", None)  # whose type the line above may have changed
    return partial(kernel, layer, weight=layer.weight, bias=bias)


def int8_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product | None:
    """A product with the weight in 8 bits, where this CPU gains by it; else None.

    Args:
        weight: ``[out, in]``; other types than bfloat16 and float32 stay as they are.
        bias: ``[out]``.
    """
    if weight.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        # What SGLang's kernel, which vLLM's CPU build has, can lay out.
        fits = weight.shape[0] % 16 == 0 and weight.shape[1] % 32 == 0
        make = _by_amx if fits and weight.numel() >= _LEAST_FOR_AMX else None
    elif (
        torch.cpu._is_vnni_supported()
        and weight.dtype in (torch.bfloat16, torch.float32)
        and weight.numel() >= _LEAST_FOR_VNNI
    ):
        make = _by_vnni
    else:
        make = None
    if make is None:
        return None
    try:
        product = make(weight, bias)
        # Neither kernel is one that vLLM promises to keep.
        _require_close(product, weight, bias)
    except (AttributeError, AssertionError, RuntimeError, TypeError) as error:
        logger.debug("%s: no 8-bit product %s: %s", METHOD, tuple(weight.shape), error)
        return None
    return product


def _require_close(
    product: Product, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Raise unless a product is what it should be, as far as 8 bits can say it."""
    # As large as after a norm.
    numbers = torch.arange(4 * weight.shape[1], dtype=torch.float32)
    rows = torch.sin(numbers).reshape(4, -1).to(weight.dtype)
    expected = nn.functional.linear(rows, weight, bias).float()
    distance = (product(rows).float() - expected).norm()
    assert distance <= _CLOSE * expected.norm(), f"it is off by {distance:.3g}"


def _by_amx(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    rounded, scales = _rounded(weight)
    packed = torch.ops._C.convert_weight_packed(rounded)
    if bias is not None:
        bias = bias.detach().float()
    kernel = torch.ops._C.int8_scaled_mm_with_quant

    def product(rows: torch.Tensor) -> torch.Tensor:
        return kernel(rows, packed, scales, bias, rows.dtype, True)

    return product


def _by_vnni(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    rounded, scales = _rounded(weight)
    of_outputs = scales[None]
    handler = ops.create_onednn_scaled_mm(
        rounded.t(), of_outputs, weight.dtype, True, False, 32
    )
    # The handler points into it.
    handler.scales = of_outputs  # type: ignore[attr-defined]
    if bias is not None:
        bias = bias.detach().float()
    num_outputs = weight.shape[0]

    def product(rows: torch.Tensor) -> torch.Tensor:
        quantised, row_scales, _ = ops.onednn_scaled_int8_quant(rows, None, None, True)
        result = rows.new_empty(len(rows), num_outputs)
        ops.onednn_scaled_mm(handler, quantised, result, row_scales, None, None, bias)
        return result

    return product


def _rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight ``[out, in]`` as int8, and the scale ``[out]`` float32 of each row."""
    wide = weight.detach().float()
    scales = wide.abs().amax(dim=1).clamp(min=1e-12) / _INT8_MAX
    return (wide / scales[:, None]).round().to(torch.int8), scales
