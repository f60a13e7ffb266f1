# SPDX-License-Identifier: Apache-2.0
"""Products in 8 bits, on CPUs that have them."""

import pytest
import torch
from torch import nn

from vllm_mtp.drafter.heads import OwnHeads
from vllm_mtp.drafter.layers import BlockRows, PositionLinear
from vllm_mtp.serving import kernels
from vllm_mtp.serving.kernels import int8_product, use_vllm_kernels

HAS_AMX = torch.cpu._is_amx_tile_supported()
HAS_VNNI = torch.cpu._is_vnni_supported()


def weight_of(outputs: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(outputs)
    # Channels of very different size, which one scale for all would lose.
    sizes = torch.logspace(-3, 1, outputs)[:, None]
    return (torch.randn(outputs, inputs, generator=generator) * sizes).to(dtype)


def require_close(product: kernels.Product, weight: torch.Tensor, bias: object) -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(33, weight.shape[1], generator=generator).to(weight.dtype)
    expected = nn.functional.linear(given, weight, bias).float()  # type: ignore
    got = product(given)
    assert got.dtype == weight.dtype
    # Of each output by itself, so that small channels count as well.
    distance = (got.float() - expected).norm(dim=0)
    assert (distance <= 0.05 * expected.norm(dim=0)).all()
    for rows in (1, 4):  # each row has its own scale
        torch.testing.assert_close(product(given[:rows]), got[:rows])


@pytest.mark.skipif(not HAS_AMX, reason="needs AMX")
@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_on_amx(biased: bool) -> None:
    weight = weight_of(512, 576, torch.bfloat16)
    bias = torch.linspace(-1, 1, 512).bfloat16() if biased else None
    product = int8_product(weight, bias)
    assert product is not None
    require_close(product, weight, bias)


@pytest.mark.skipif(not HAS_VNNI, reason="needs VNNI")
def test_a_head_without_amx() -> None:
    weight = weight_of(8192, 512, torch.float32)
    product = int8_product(weight, None)
    assert product is not None
    require_close(product, weight, None)


@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype"),
    [
        (32, 576, torch.bfloat16),  # small
        (520, 576, torch.bfloat16),  # not in whole tiles
        (512, 580, torch.bfloat16),
        (512, 576, torch.float32),  # a layer without AMX
    ],
)
def test_what_stays_as_it_is(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    assert int8_product(weight_of(outputs, inputs, dtype), None) is None


def test_a_kernel_that_is_wrong_or_gone_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    weight = weight_of(512, 576, torch.bfloat16)

    def twice(weight: torch.Tensor, bias: object) -> kernels.Product:
        return lambda rows: 2 * nn.functional.linear(rows, weight)

    def gone(weight: torch.Tensor, bias: object) -> kernels.Product:
        raise AttributeError("no such operator")

    for make in (twice, gone):
        monkeypatch.setattr(kernels, "_by_amx", make)
        assert int8_product(weight, None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [BlockRows(3), BlockRows(2), BlockRows(1, first=2)])
def test_weights_for_each_position(rows: BlockRows, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = PositionLinear(3, 64, 512, bias=True)
    heads = OwnHeads(3, 64, 512)
    for weight in (*linear.parameters(), *heads.parameters()):
        nn.init.normal_(weight)
    modules = nn.ModuleList([linear, heads]).to(dtype)
    x = torch.randn(5 * rows.num_positions, 64).to(dtype)
    expected = linear(x, rows)
    logits = heads(rows.by_block(x))
    use_vllm_kernels(modules)
    for got, wanted in (
        (linear(x, rows), expected),
        (heads(rows.by_block(x)), logits),
    ):
        assert got.shape == wanted.shape
        assert (got - wanted).norm() <= 0.02 * wanted.norm()


def test_weights_that_changed_are_taken_anew() -> None:
    module = nn.Sequential(nn.Linear(576, 512), nn.Linear(512, 64)).bfloat16()
    other = nn.Sequential(nn.Linear(576, 512), nn.Linear(512, 64)).bfloat16()
    rows = torch.randn(5, 576, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        expected = other(rows).float()
        use_vllm_kernels(module)
        for tensor, value in zip(module.parameters(), other.parameters(), strict=True):
            tensor.copy_(value)
        use_vllm_kernels(module)
        assert (module(rows).float() - expected).norm() < 0.03 * expected.norm()


def test_every_linear_of_a_module_computes_as_before() -> None:
    module = nn.Sequential(nn.Linear(576, 512), nn.Linear(512, 64, bias=False))
    module = module.bfloat16()
    rows = torch.randn(5, 576, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        before = module(rows).float()
        use_vllm_kernels(module)
        after = module(rows).float()
    assert (after - before).norm() < 0.03 * before.norm()
