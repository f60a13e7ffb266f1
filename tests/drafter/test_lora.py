# SPDX-License-Identifier: Apache-2.0
"""LoRA on modules as transformers names them and as vLLM merges them."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from checkpoints_spec.goldens import fill_weights, fixed_values
from tests.drafter.test_target_facts import FACTS
from vllm_mtp.drafter.config import LoRAConfig
from vllm_mtp.drafter.host import OneRank
from vllm_mtp.drafter.lora import LowRankPair, gated, linear_sizes, with_lora
from vllm_mtp.errors import UnsupportedTargetError

CONFIG = LoRAConfig(rank=3, alpha=6.0, modules=("q_proj",))
QUERIES, KEYS, MLP = 128, 64, 96
GATE = torch.tensor([[0.0], [1.0], [1.0]])
HOST = OneRank()


class MergedLinear(nn.Linear):
    """Returns a pair, as vLLM's linears do."""

    quant_method = "none"

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class MergedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj = MergedLinear(64, QUERIES + 2 * KEYS)
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = MergedLinear(64, 2 * MLP)
        # Held by a container itself, which a shadow copies: not so the weight.
        self.self_attn.sinks = nn.Parameter(torch.empty(4))
        fill_weights(self, std=0.3)


def _pair(name: str) -> LowRankPair:
    pair = LowRankPair(linear_sizes(FACTS, name), CONFIG)  # type: ignore[arg-type]
    fill_weights(pair, std=0.5, salt=name)
    return pair


@pytest.mark.parametrize(
    ("names", "path", "starts"),
    [
        (["q_proj"], "self_attn.qkv_proj", [0]),
        (["k_proj"], "self_attn.qkv_proj", [QUERIES]),
        (["v_proj", "q_proj"], "self_attn.qkv_proj", [QUERIES + KEYS, 0]),
        (["gate_proj"], "mlp.gate_up_proj", [0]),
        (["gate_proj", "up_proj"], "mlp.gate_up_proj", [0, MLP]),
    ],
)
@torch.no_grad()
def test_merged_modules_change_in_their_slices(
    names: list[str], path: str, starts: list[int]
) -> None:
    layer = MergedLayer()
    pairs = {name: _pair(name) for name in names}
    changed = with_lora(layer, pairs.items(), FACTS, HOST).get_submodule(path)
    x = fixed_values("x", torch.Size([3, 64]), 1.0)
    expected = layer.get_submodule(path)(x)[0].clone()
    for start, pair in zip(starts, pairs.values(), strict=True):
        change = CONFIG.alpha / CONFIG.rank * x @ (pair.b @ pair.a).t()
        expected[1:, start : start + pair.b.shape[0]] += change[1:]
    output, bias = gated(changed, GATE)(x)
    assert bias is None
    torch.testing.assert_close(output, expected)
    assert output[0].equal(layer.get_submodule(path)(x)[0][0])


@torch.no_grad()
def test_where_keys_are_values_their_pair_changes_both() -> None:
    """As where one module gives both: vLLM has its rows twice in the merged one."""
    layer = MergedLayer()
    pair, values = _pair("k_proj"), _pair("k_proj")
    x = fixed_values("x", torch.Size([3, 64]), 1.0)

    def changed(pairs: dict[str, LowRankPair], **how: bool) -> torch.Tensor:
        shadow = with_lora(layer, pairs.items(), FACTS, HOST, **how)  # type: ignore[arg-type]
        return gated(shadow.self_attn.qkv_proj, GATE)(x)[0]

    both = changed({"k_proj": pair}, keys_are_values=True)
    torch.testing.assert_close(both, changed({"k_proj": pair, "v_proj": values}))
    assert not both.isclose(changed({"k_proj": pair})).all()


def test_stand_in_answers_like_its_base() -> None:
    stand_in = with_lora(
        MergedLayer(), [("q_proj", _pair("q_proj"))], FACTS, HOST
    ).self_attn.qkv_proj
    assert stand_in.quant_method == "none"
    assert stand_in.in_features == 64
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = stand_in.no_such_thing


def test_the_pairs_stay_out_of_the_targets_weights() -> None:
    layer = MergedLayer()
    shadow = with_lora(layer, [("q_proj", _pair("q_proj"))], FACTS, HOST)
    own = {id(weight) for weight in layer.parameters()}
    assert {id(weight) for weight in shadow.parameters()} == own


def test_missing_modules_are_named() -> None:
    with pytest.raises(UnsupportedTargetError) as caught:
        with_lora(MergedLayer(), [("o_proj", _pair("o_proj"))], FACTS, HOST)
    assert "module 'o_proj'" in str(caught.value)
    assert "MergedLayer" in str(caught.value)
    assert "'qkv_proj'" in str(caught.value)  # what there is


@pytest.mark.parametrize(
    "position",
    [lambda layer: layer, lambda layer: layer.self_attn],
    ids=["layer", "child"],
)
def test_layers_with_a_patched_forward_are_refused(
    position: Callable[[nn.Module], nn.Module],
) -> None:
    layer = MergedLayer()
    position(layer).forward = lambda x: x
    with pytest.raises(UnsupportedTargetError, match="patched forward"):
        with_lora(layer, [("q_proj", _pair("q_proj"))], FACTS, HOST)


@pytest.mark.parametrize("facts", [{"intermediate_size": 80}, {"hidden_size": 32}])
def test_a_module_of_other_sizes_is_refused(facts: dict[str, int]) -> None:
    """As a shared expert, or a module that is whole on every rank."""
    other = FACTS.model_copy(update=facts)
    pair = LowRankPair(linear_sizes(other, "up_proj"), CONFIG)
    with pytest.raises(UnsupportedTargetError) as caught:
        with_lora(MergedLayer(), [("up_proj", pair)], other, HOST)
    assert "mlp.gate_up_proj has (inputs, outputs) (64, 192)" in str(caught.value)
