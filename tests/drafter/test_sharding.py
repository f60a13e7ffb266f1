# SPDX-License-Identifier: Apache-2.0
"""The ranks' parts of a drafter together are the drafter.

Ranks are threads here. Each holds its heads of a transformers target, cut in the test's
own way, and its part of the drafter, and they sum as vLLM's ranks do.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec.goldens import GOLDENS, fill_weights, golden_drafter
from checkpoints_spec.goldens import golden_target as make_golden_target
from tests.tiny_targets import VOCAB_SIZE
from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.config import OwnLayerConfig
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.drafter.sharding import Rank, part_of, require_divisible
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.torch_host.target_states import TargetStates
from vllm_mtp.torch_host.texts import TextBlocks, forward_texts

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = torch.arange(24) * 37 % VOCAB_SIZE
PREFIX_LENS = torch.tensor([1, 5, 12, 20])
NUM_PLACES = 3
# The tiny targets have 4 heads and 2 KV heads: with 4 ranks, two share a KV head.
SIZES = [2, 4]


class Group:
    """Sums over the ranks of one test."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.parts: list[torch.Tensor] = [torch.empty(0)] * size
        self.sums = 0

    def all_reduce(self, index: int, part: torch.Tensor) -> torch.Tensor:
        self.parts[index] = part
        if self.barrier.wait() == 0:
            self.sums += 1
        total = torch.stack(self.parts).sum(dim=0)
        self.barrier.wait()
        return total


class RowParallel(nn.Module):
    """As vLLM's: this rank's inputs of a linear module, and the sum over ranks."""

    def __init__(self, linear: nn.Linear, columns: torch.Tensor, host: Any) -> None:
        super().__init__()
        self.partial = _linear(linear.weight[:, columns])
        self.in_features, self.out_features = len(columns), linear.out_features
        self.sum = host.all_reduce

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sum(self.partial(x))


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear


class RankTarget(HFTarget):
    """One rank's heads of a target."""

    def __init__(self, model: PreTrainedModel, rank: Rank, group: Group) -> None:
        super().__init__(copy.deepcopy(model))
        self.rank, self.group = rank, group
        config = model.config
        num_heads = config.num_attention_heads // rank.size
        heads = range(rank.index * num_heads, (rank.index + 1) * num_heads)
        per_kv_head = config.num_attention_heads // config.num_key_value_heads
        self.kv_heads = sorted({head // per_kv_head for head in heads})
        width = config.intermediate_size // rank.size
        mlp = torch.arange(rank.index * width, (rank.index + 1) * width)
        queries = _rows_of(list(heads), config.head_dim)
        keys = _rows_of(self.kv_heads, config.head_dim)
        for layer in self.decoder.layers:
            attention, gated = layer.self_attn, layer.mlp
            attention.q_proj = _linear(attention.q_proj.weight[queries])
            attention.k_proj = _linear(attention.k_proj.weight[keys])
            attention.v_proj = _linear(attention.v_proj.weight[keys])
            attention.o_proj = RowParallel(attention.o_proj, queries, self)
            gated.gate_proj = _linear(gated.gate_proj.weight[mlp])
            gated.up_proj = _linear(gated.up_proj.weight[mlp])
            gated.down_proj = RowParallel(gated.down_proj, mlp, self)

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        return self.group.all_reduce(self.rank.index, partial)

    def without_all_reduce(self, linear: nn.Module) -> nn.Module | None:
        return linear.partial if isinstance(linear, RowParallel) else None

    def states_of(self, whole: TargetStates) -> TargetStates:
        keys, values = (
            {layer: heads[self.kv_heads] for layer, heads in kind.items()}
            for kind in (whole.keys, whole.values)
        )
        return TargetStates(keys, values, whole.hidden)


def _rows_of(heads: list[int], head_dim: int) -> torch.Tensor:
    return torch.cat([torch.arange(h * head_dim, (h + 1) * head_dim) for h in heads])


@pytest.fixture(params=["tiny_llama", "tiny_qwen3"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def target(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval().requires_grad_(False)


@pytest.fixture
def make(folder: Path) -> Callable[..., Drafter]:
    """Makes float32 drafters without a weight at a start value."""

    def _make(
        layers: str, token_ids: Sequence[int] | None = None, **options: Any
    ) -> Drafter:
        settings = DrafterOptions(dtype="float32", **options)
        drafter = new_drafter(folder, layers, NUM_PLACES, settings, token_ids)
        fill_weights(drafter, 0.2, salt="random ")
        return drafter.requires_grad_(False)

    return _make


@torch.no_grad()
def run(host: HFTarget, drafter: Drafter, states: TargetStates) -> torch.Tensor:
    """The blocks' last hidden states. ``[B, k, hidden_size]``."""
    text = TextBlocks(TOKENS, states, PREFIX_LENS)
    return forward_texts(BoundDrafter(drafter, host), [text], NUM_PLACES)


def run_in_ranks(
    target: PreTrainedModel, drafter: Drafter, size: int
) -> tuple[list[torch.Tensor], int]:
    """The same in ranks: what each of them gives, and how often they summed."""
    whole, group = HFTarget(target).encode(TOKENS), Group(size)

    def run_one(index: int) -> torch.Tensor:
        rank = Rank(index, size)
        try:
            host = RankTarget(target, rank, group)
            part, states = part_of(drafter, rank), host.states_of(whole)
            run(host, part, states)  # in which the host looks at the target's layers
            if group.barrier.wait() == 0:
                group.sums = 0
            group.barrier.wait()
            return run(host, part, states)
        except BaseException:
            group.barrier.abort()  # or the others would wait
            raise

    with ThreadPoolExecutor(size) as threads:
        results = list(threads.map(run_one, range(size)))
    return results, group.sums


def lora(*modules: str) -> dict[str, Any]:
    return {"lora_rank": 2, "lora_modules": [*modules]}


EVERYTHING = {
    **lora(*MODULES),
    "markov_rank": 2,
    "boundary_hidden": "all",
    "token_ids": tuple(range(0, VOCAB_SIZE, 4)),
}
DRAFTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "shared": ("shared:all", {}),
    "own": ("own:0,3", {}),
    "mixed": ("shared:0,1,own:2", EVERYTHING),
} | {name: ("shared:1,2", lora(name)) for name in MODULES}
# With the number of sums over ranks.
AXES: dict[str, tuple[str, dict[str, Any], int]] = {
    "own layers per position": (
        "own:0,3",
        {"per_position": True, "bridges": True, "boundary_hidden": "all"},
        4,
    ),
    "block alone": ("own:0,3", {"own_attention": "block"}, 4),
    "bidirectional": ("shared:0,own:3", {"block_mask": "bidirectional"}, 4),
    "gated": ("own:1,mlp:2", {"mlp_form": "gated"}, 4),
    "plain": ("own:1,mlp:1", {"mlp_form": "plain"}, 3),
    "plain per position": ("mlp:2", {"mlp_form": "plain", "per_position": True}, 2),
    "square": ("own:1,mlp:2", {"mlp_form": "square", "per_position": True}, 2),
    "full rank": ("shared:1,2", {"full_rank_modules": [*MODULES]}, 4),
    "chain": ("shared:1,own:2,mlp:1", {"chain": True, **lora("o_proj")}, 5 * 3),
}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("size", SIZES)
def test_ranks_together_compute_what_one_process_does(
    size: int, name: str, target: PreTrainedModel, make: Callable[..., Drafter]
) -> None:
    layers, options = DRAFTERS[name]
    drafter = make(layers, **options)
    host = HFTarget(target)
    expected = run(host, drafter, host.encode(TOKENS))
    results, num_sums = run_in_ranks(target, drafter, size)
    for result in results:
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
        assert result.equal(results[0])
    # One behind the attention and one behind the MLP; LoRA needs none of its own.
    assert num_sums == 2 * len(drafter.layers)


@pytest.mark.parametrize("name", AXES)
def test_every_axis_is_cut_into_ranks(
    name: str, target: PreTrainedModel, make: Callable[..., Drafter]
) -> None:
    layers, options, num_sums = AXES[name]
    drafter = make(layers, **options)
    host = HFTarget(target)
    expected = run(host, drafter, host.encode(TOKENS))
    results, found = run_in_ranks(target, drafter, 2)
    for result in results:
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
        assert result.equal(results[0])
    assert found == num_sums


def test_own_lm_heads_are_whole_on_every_rank(
    target: PreTrainedModel, make: Callable[..., Drafter]
) -> None:
    drafter = make("mlp:1", lm_head="own", input="boundary", mlp_form="square")
    hidden = torch.randn(2, NUM_PLACES, target.config.hidden_size)
    host = HFTarget(target)
    expected = BoundDrafter(drafter, host).logits(hidden)
    for index in range(2):
        part = BoundDrafter(part_of(drafter, Rank(index, 2)), host)
        assert part.logits(hidden).equal(expected)


def test_a_change_of_a_pair_shows_in_the_ranks(
    target: PreTrainedModel, make: Callable[..., Drafter]
) -> None:
    """So that the comparison above can fail for the smallest of parts."""
    drafter = make("shared:1,2", **lora("down_proj"))
    before, _ = run_in_ranks(target, drafter, 2)
    drafter.layers[1].lora["down_proj"].b.data *= 2
    after, _ = run_in_ranks(target, drafter, 2)
    assert (before[0] - after[0]).abs().max() > 1e-2


BY_OUTPUTS = ("q_proj", "gate_proj", "up_proj")
KEYS = ("k_proj", "v_proj")


@pytest.mark.parametrize("size", SIZES)
def test_every_weight_is_cut_once_or_whole(
    size: int, make: Callable[..., Drafter]
) -> None:
    drafter = make("shared:0,1,own:2", **EVERYTHING)
    parts = [part_of(drafter, Rank(i, size)).state_dict() for i in range(size)]
    for name, whole in drafter.state_dict().items():
        tensors = [part[name] for part in parts]
        module, kind = (["", *name.split(".")])[-2:]
        if module in KEYS and kind != "a":
            each = size // min(size, 2)  # ranks per KV head
            assert all(
                t.equal(tensors[i // each * each]) for i, t in enumerate(tensors)
            )
            assert torch.cat(tensors[::each]).equal(whole), name
        elif module in BY_OUTPUTS and kind != "a":
            assert torch.cat(tensors).equal(whole), name
        elif module in ("o_proj", "down_proj") and kind != "b":
            assert torch.cat(tensors, dim=1).equal(whole), name
        else:
            assert all(tensor.equal(whole) for tensor in tensors), name


def test_biases_and_norms_of_the_golden_drafter_are_cut_with_their_heads() -> None:
    """3 heads, 1 KV head, with biases: 3 ranks have a head each and the same keys."""
    drafter = golden_drafter("mixed", make_golden_target("mixed"))
    drafter.config = drafter.config.model_copy(
        update={"layers": tuple(map(_as_wide_as_three_ranks, drafter.config.layers))}
    )
    whole = drafter.layers[1]
    whole.gate_proj, whole.up_proj = (_linear(torch.rand(21, 18)) for _ in range(2))
    whole.down_proj = _linear(torch.rand(18, 21))
    layers = [part_of(drafter, Rank(i, 3)).layers[1] for i in range(3)]
    assert torch.cat([part.q_proj.bias for part in layers]).equal(whole.q_proj.bias)
    for part in layers:
        assert part.k_proj.bias.equal(whole.k_proj.bias)
        assert part.v_proj.weight.equal(whole.v_proj.weight)
        assert part.q_norm.weight.equal(whole.q_norm.weight)
        assert part.gate_proj.weight.shape == (7, 18)


def _as_wide_as_three_ranks(layer: Any) -> Any:
    if not isinstance(layer, OwnLayerConfig):
        return layer
    return layer.model_copy(update={"intermediate_size": 21})


def test_parts_do_not_keep_the_whole_weight_alive(make: Callable[..., Drafter]) -> None:
    part = part_of(make("own:0"), Rank(1, 2))
    for name in MODULES:
        weight = part.get_parameter(f"layers.0.{name}.weight")
        assert weight.untyped_storage().nbytes() == weight.nbytes
        assert weight.is_contiguous()


def test_one_rank_runs_the_drafter_itself(make: Callable[..., Drafter]) -> None:
    drafter = make("shared:0,own:1", **EVERYTHING)
    assert part_of(drafter, Rank(0, 1)) is drafter


@pytest.mark.parametrize(
    ("golden", "size", "expected"),
    [
        (
            "mixed",
            2,
            ["target.num_attention_heads: got 3", "multiple of 2", "fits: 1."],
        ),
        ("mixed", 3, ["layers.1.intermediate_size: got 20", "multiple of 3"]),
        ("shared-lora", 3, ["target.intermediate_size: got 28", "fits: 1."]),
    ],
)
def test_sizes_that_do_not_divide_are_refused(
    golden: str, size: int, expected: list[str]
) -> None:
    assert golden in GOLDENS
    drafter = golden_drafter(golden, make_golden_target(golden))
    with pytest.raises(UnsupportedTargetError) as error:
        part_of(drafter, Rank(0, size))
    for text in (f"tensor_parallel_size={size}", *expected):
        assert text in str(error.value)


def test_kv_heads_must_divide_or_be_divided(make: Callable[..., Drafter]) -> None:
    """12 heads and 4 KV heads fit in 2, 4 and 12 ranks, but not in 3 or 6."""
    config = make("shared:0").config
    target = config.target.model_copy(
        update={"num_attention_heads": 12, "num_key_value_heads": 4}
    )
    config = config.model_copy(update={"target": target})
    for size in (1, 2, 4, 12):
        require_divisible(config, size)
    for size in (3, 6):
        with pytest.raises(UnsupportedTargetError) as error:
            require_divisible(config, size)
        assert "num_key_value_heads: got 4" in str(error.value)
        assert "fits: 1, 2, 4, 12." in str(error.value)
