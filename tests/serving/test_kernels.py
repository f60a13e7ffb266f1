# SPDX-License-Identifier: Apache-2.0
"""Products in 8 bits, on CPUs that have them."""

import pytest
import torch
from torch import nn

from checkpoints_spec.goldens import fill_weights
from tests.drafter.test_target_facts import FACTS
from vllm_mtp.drafter.config import LinearName, LoRAConfig
from vllm_mtp.drafter.heads import OwnHeads
from vllm_mtp.drafter.host import OneRank
from vllm_mtp.drafter.layers import BlockRows, PositionLinear
from vllm_mtp.drafter.lora import (
    Change,
    FullRankChange,
    GatedLinear,
    LowRankPair,
    gated,
    linear_sizes,
    with_lora,
)
from vllm_mtp.serving import kernels
from vllm_mtp.serving.kernels import int8_product, merge_changes, use_vllm_kernels

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


QUERIES, KEYS = 128, 64  # of FACTS
CHANGES = {
    "pairs": (("q_proj", 3), ("v_proj", 5), ("k_proj", 16)),
    "one pair": (("k_proj", 4),),
    "full rank": (("q_proj", None), ("v_proj", None)),
    "both": (("q_proj", None), ("k_proj", 8)),
}


class Merged(nn.Module):
    """A target's layer of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(64, QUERIES + 2 * KEYS)
        fill_weights(self, std=0.3)


@pytest.mark.parametrize("keys_are_values", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@torch.inference_mode()
def test_changes_of_the_targets_modules(
    changes: tuple[tuple[LinearName, int | None], ...],
    dtype: torch.dtype,
    keys_are_values: bool,
) -> None:
    made: dict[LinearName, Change] = {}
    for name, rank in changes:
        sizes = linear_sizes(FACTS, name)
        made[name] = (
            FullRankChange(sizes)
            if rank is None
            else LowRankPair(sizes, LoRAConfig(rank=rank, alpha=3, modules=(name,)))
        )
    layer = Merged().to(dtype)
    pairs = nn.ModuleDict(made).to(dtype)
    shadow = with_lora(
        layer, made.items(), FACTS, OneRank(), keys_are_values=keys_are_values
    )
    linear = shadow.qkv_proj
    assert isinstance(linear, GatedLinear)
    gate = torch.tensor([0.0, 1, 1, 0, 1, 1], dtype=dtype)[:, None]
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(2)).to(dtype)

    for seed in (0, 1):  # the second time the weights have changed
        fill_weights(pairs, std=0.3, salt=str(seed))
        linear.added = [*linear.branches]
        expected = gated(linear, gate)(x)
        merge_changes([linear])
        got = gated(linear, gate)(x)
        plain = layer.qkv_proj(x)
        assert got[gate[:, 0] == 0].equal(plain[gate[:, 0] == 0])
        change = (expected - plain).float().norm()
        assert change > 0.1 * plain.float().norm()
        assert (got - expected).float().norm() < 0.01 * change
        # As the layers of some targets have it.
        assert gated(linear, gate)(x[None]).equal(got[None])


def test_the_pairs_of_a_module_are_one() -> None:
    layer, pairs = Merged(), {}
    for name in ("q_proj", "k_proj", "v_proj"):
        config = LoRAConfig(rank=4, alpha=4, modules=(name,))
        pairs[name] = LowRankPair(linear_sizes(FACTS, name), config)
    linear = with_lora(layer, pairs.items(), FACTS, OneRank()).qkv_proj  # type: ignore
    merge_changes([linear])
    assert (len(linear.branches), len(linear.added)) == (3, 1)


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
