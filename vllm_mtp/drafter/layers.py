# SPDX-License-Identifier: Apache-2.0
"""The kinds of draft layer: shared with the target, the drafter's own, or an MLP."""

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vllm_mtp.drafter.config import (
    MLPLayerConfig,
    OwnLayerConfig,
    SharedLayerConfig,
)
from vllm_mtp.drafter.lora import (
    Change,
    FullRankChange,
    LowRankPair,
    gated,
    linear_sizes,
    with_lora,
)
from vllm_mtp.drafter.target_facts import TargetFacts

if TYPE_CHECKING:
    from vllm_mtp.drafter.host import TargetHost


class Stream(NamedTuple):
    """The residual stream between two draft layers.

    vLLM's layers hand the residual on unadded, so that the next norm can fuse
    the addition; added early, bfloat16 results would differ from the target's.
    """

    hidden: torch.Tensor  # shape: [rows, hidden_size]
    residual: torch.Tensor | None = None  # shape: [rows, hidden_size]

    def summed(self) -> torch.Tensor:
        """The stream as one tensor. ``[rows, hidden_size]``."""
        if self.residual is None:
            return self.hidden
        return self.hidden + self.residual


class BlockRows(NamedTuple):
    """How rows belong to blocks, one block after the other."""

    num_positions: int  # of each block
    first: int = 0  # which position of its block a block's first row is
    causal: bool = True  # whether a row reads only rows of its block that stand before

    def by_block(self, rows: torch.Tensor) -> torch.Tensor:
        """``[rows, ...]`` to ``[B, num_positions, ...]``."""
        return rows.unflatten(0, (-1, self.num_positions))


class PositionLinear(nn.Module):
    """A linear map for each position of a block."""

    def __init__(
        self, num_positions: int, inputs: int, outputs: int, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_positions, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(num_positions, outputs)) if bias else None

    def forward(self, x: torch.Tensor, rows: BlockRows) -> torch.Tensor:
        """``[rows, inputs]`` to ``[rows, outputs]``."""
        which = slice(rows.first, rows.first + rows.num_positions)
        out = each_position(rows.by_block(x), self.weight[which])
        if self.bias is not None:
            out = out + self.bias[which].to(out.dtype)
        return out.flatten(0, 1)


def each_position(blocks: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows ``[B, positions, inputs]`` by the map of their position, of ``[positions,
    outputs, inputs]``. ``[B, positions, outputs]``."""
    by_position = blocks.transpose(0, 1)
    return (by_position @ weights.to(blocks.dtype).mT).transpose(0, 1)


def linear_map(
    inputs: int, outputs: int, num_positions: int | None, *, bias: bool = False
) -> Any:
    """One linear map, or one for each of so many positions; see `project`."""
    if num_positions is None:
        return nn.Linear(inputs, outputs, bias=bias)
    return PositionLinear(num_positions, inputs, outputs, bias=bias)


def project(linear: nn.Module, x: torch.Tensor, rows: BlockRows) -> torch.Tensor:
    """``[rows, inputs]`` to ``[rows, outputs]``, by one map or by each position's."""
    return linear(x, rows) if isinstance(linear, PositionLinear) else linear(x)


class Norm(nn.Module):
    """RMSNorm, or LayerNorm without a bias.

    It rounds where vLLM and transformers round: before the weight.
    """

    def __init__(self, size: int, eps: float, *, centered: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.centered = centered

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., size]``, same shape and dtype out."""
        return self._scaled(x.float(), x.dtype)

    def of_stream(self, stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the stream up and normalise it.

        The sum is normalised before it is rounded, as vLLM's layers do; a copy of
        a bfloat16 target would otherwise drift from it.

        Returns:
            The normalised and the plain sum, each ``[rows, size]``.
        """
        if stream.residual is None:
            return self(stream.hidden), stream.hidden
        wide = stream.hidden.float() + stream.residual.float()
        dtype = stream.hidden.dtype
        return self._scaled(wide, dtype), wide.to(dtype)

    def _scaled(self, wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.centered:
            wide = wide - wide.mean(-1, keepdim=True)
        return _unit_rms(wide, self.eps).to(dtype) * self.weight


def _unit_rms(wide: torch.Tensor, eps: float) -> torch.Tensor:
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


class SharedLayer(nn.Module):
    """The target's own layer; only what placeholder rows change has weights here."""

    def __init__(self, config: SharedLayerConfig, facts: TargetFacts) -> None:
        super().__init__()
        self.target_layer = config.target_layer
        self.facts = facts = facts.of_layer(config.target_layer)
        self.lora = nn.ModuleDict()
        if lora := config.lora:
            for name in lora.modules:
                self.lora[name] = LowRankPair(linear_sizes(facts, name), lora)
        self.full_rank = nn.ModuleDict(
            {n: FullRankChange(linear_sizes(facts, n)) for n in config.full_rank}
        )

    def bind(self, target: "TargetHost") -> nn.Module:
        """The module to run on ``target``: its own layer, or a shadow with changes."""
        layer = target.layer(self.target_layer)
        if not self.changes:
            return layer
        same = target.keys_are_values(self.target_layer)
        return with_lora(layer, self.changes, self.facts, target, keys_are_values=same)

    @property
    def changes(self) -> list[tuple[Any, Change]]:
        """What placeholder rows change, by the linear module."""
        return [*self.lora.items(), *self.full_rank.items()]  # type: ignore[list-item]

    def forward(
        self,
        target: "TargetHost",
        bound: nn.Module,
        stream: Stream,
        positions: torch.Tensor,
        gate: torch.Tensor,
    ) -> Stream:
        """The target's layer on the block's rows.

        Args:
            target: Runs it on the layer's cache.
            bound: From `bind`.
            stream: ``[rows, hidden_size]``.
            positions: ``[rows]`` int64.
            gate: ``[rows, 1]``; 1 where the changes act.
        """
        layer = gated(bound, gate) if len(self.lora) + len(self.full_rank) else bound
        return target.run_layer(layer, self.target_layer, stream, positions)

    def init_weights(self, generator: torch.Generator) -> None:
        for _, change in self.changes:
            change.init_weights(generator)


class OwnLayer(nn.Module):
    """A layer that reads the KV cache of the target layer it is bound to."""

    def __init__(
        self, config: OwnLayerConfig, facts: TargetFacts, num_positions: int
    ) -> None:
        super().__init__()
        self.target_layer = config.target_layer
        self.config = config
        facts = facts.of_layer(config.target_layer)
        self.head_dim = facts.head_dim
        hidden, mlp = facts.hidden_size, config.intermediate_size
        queries = facts.num_attention_heads * facts.head_dim
        keys = facts.num_key_value_heads * facts.head_dim

        def norm(size: int, *, wanted: bool = True, centered: bool = False) -> Any:
            eps = config.rms_norm_eps
            return Norm(size, eps, centered=centered) if wanted else None

        linear = partial(
            linear_map, num_positions=num_positions if config.per_position else None
        )
        centered, placement = config.norm == "layer", config.norm_placement
        before = placement in ("before", "around")
        after = placement in ("after", "around")
        self.boundary_proj = linear(hidden, hidden) if config.boundary_hidden else None
        self.bridge = linear(hidden, hidden, bias=True) if config.bridge else None
        self.input_norm = norm(hidden, wanted=before, centered=centered)
        self.q_proj = linear(hidden, queries, bias=config.qkv_bias)
        self.k_proj = linear(hidden, keys, bias=config.qkv_bias)
        self.v_proj = linear(hidden, keys, bias=config.qkv_bias)
        self.output_gate_proj = linear(hidden, queries) if config.output_gate else None
        self.o_proj = linear(queries, hidden)
        # Apart, since the projection's parts are summed over ranks first.
        self.o_bias = nn.Parameter(torch.empty(hidden)) if config.o_bias else None
        whole = config.qk_norm_whole
        self.q_norm = norm(queries if whole else self.head_dim, wanted=config.qk_norm)
        self.k_norm = norm(keys if whole else self.head_dim, wanted=config.qk_norm)
        self.attention_out_norm = norm(hidden, wanted=after, centered=centered)
        self.mlp_norm = norm(
            hidden, wanted=before and not config.parallel, centered=centered
        )
        self.gate_proj = linear(hidden, mlp)
        self.up_proj = linear(hidden, mlp)
        self.down_proj = linear(mlp, hidden)
        self.mlp_out_norm = norm(hidden, wanted=after, centered=centered)
        self.output_scale = (
            nn.Parameter(torch.empty(1)) if config.output_scale else None
        )

    def forward(
        self,
        target: "TargetHost",
        stream: Stream,
        positions: torch.Tensor,
        boundary: torch.Tensor | None,
        rows: BlockRows,
    ) -> Stream:
        """One layer.

        Args:
            target: Gives RoPE and attention over the bound layer's cache.
            stream: ``[rows, hidden_size]``.
            positions: ``[rows]`` int64.
            boundary: ``[rows, hidden_size]``, the boundary hidden state of each
                row's block; needed only where the layer reads it.
            rows: How they belong to blocks.
        """
        if self.bridge is not None:
            stream = Stream(project(self.bridge, stream.summed(), rows))
        if self.boundary_proj is not None:
            assert boundary is not None, "the caller gives what the config asks for"
            added = stream.hidden + project(self.boundary_proj, boundary, rows)
            stream = Stream(added, stream.residual)
        x, residual = _normed(self.input_norm, stream)
        attended = self._attention(target, x, positions, rows)
        if self.attention_out_norm is not None:
            attended = self.attention_out_norm(attended)
        if self.config.parallel:
            stream = Stream(attended + self._mlp(target, x, rows), residual)
        else:
            x, residual = _normed(self.mlp_norm, Stream(attended, residual))
            stream = Stream(self._mlp(target, x, rows), residual)
        if self.output_scale is not None:
            stream = Stream(stream.summed() * self.output_scale)
        return stream

    def _attention(
        self,
        target: "TargetHost",
        x: torch.Tensor,
        positions: torch.Tensor,
        rows: BlockRows,
    ) -> torch.Tensor:
        query, key, value = (
            project(linear, x, rows)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if not self.config.qk_norm_after_rope:
            query, key = self._qk_normed(query, key)
        query, key = target.rotate(self.target_layer, positions, query, key)
        if self.config.qk_norm_after_rope:
            query, key = self._qk_normed(query, key)
        if self.config.v_norm:
            heads = value.unflatten(-1, (-1, self.head_dim)).float()
            value = (
                _unit_rms(heads, self.config.rms_norm_eps).to(value.dtype).flatten(-2)
            )
        if self.config.attention == "prefix":
            attended = target.attend(self.target_layer, query, key, value)
        else:
            attended = self._attend_block(query, key, value, rows)
        if self.output_gate_proj is not None:
            gate = project(self.output_gate_proj, x, rows)
            attended = attended * torch.sigmoid(gate)
        out = target.all_reduce(project(self.o_proj, attended, rows))
        return out if self.o_bias is None else out + self.o_bias

    def _attend_block(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: BlockRows,
    ) -> torch.Tensor:
        """Ordinary attention within each block, whatever the target's layer adds.

        ``[rows, heads * head_dim]`` each, to ``[rows, heads * head_dim]``.
        """
        query, key, value = (
            rows.by_block(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for x in (query, key, value)
        )  # [B, heads, positions, head_dim]
        attended = F.scaled_dot_product_attention(
            query, key.to(query.dtype), value, is_causal=rows.causal, enable_gqa=True
        )
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)

    def _qk_normed(
        self, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.q_norm is None:
            return query, key
        if self.config.qk_norm_whole:
            return self.q_norm(query), self.k_norm(key)
        per_head = (-1, self.head_dim)
        return (
            self.q_norm(query.unflatten(-1, per_head)).flatten(-2),
            self.k_norm(key.unflatten(-1, per_head)).flatten(-2),
        )

    def _mlp(
        self, target: "TargetHost", x: torch.Tensor, rows: BlockRows
    ) -> torch.Tensor:
        gate = project(self.gate_proj, x, rows)
        if self.config.activation == "silu":
            gate = F.silu(gate)
        else:
            gate = F.gelu(gate, approximate="tanh")
        inner = gate * project(self.up_proj, x, rows)
        out = target.all_reduce(project(self.down_proj, inner, rows))
        return out if self.mlp_out_norm is None else self.mlp_out_norm(out)

    def init_weights(self, generator: torch.Generator) -> None:
        """Small random weights; the outputs start at zero, so an untrained layer
        passes its input through."""
        for name, weight in self.named_parameters():
            if "norm" in name or name == "output_scale":
                nn.init.ones_(weight)
            elif name == "bridge.weight":
                set_identity(weight)
            elif name.startswith(("o_proj", "down_proj", "boundary_proj")) or (
                name.endswith("bias")
            ):
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=0.02, generator=generator)


class MLPLayer(nn.Module):
    """A layer without attention."""

    def __init__(
        self, config: MLPLayerConfig, hidden_size: int, num_positions: int
    ) -> None:
        super().__init__()
        self.config = config
        linear = partial(
            linear_map, num_positions=num_positions if config.per_position else None
        )
        if config.form == "square":
            self.proj = linear(hidden_size, hidden_size, bias=True)
            return
        assert config.intermediate_size is not None, "the config was checked"
        size, plain = config.intermediate_size, config.form == "plain"
        if not plain:
            assert config.rms_norm_eps is not None, "the config was checked"
            self.norm = Norm(hidden_size, config.rms_norm_eps)
            self.gate_proj = linear(hidden_size, size, bias=False)
        self.up_proj = linear(hidden_size, size, bias=plain)
        self.down_proj = linear(size, hidden_size, bias=False)
        # Apart, since the projection's parts are summed over ranks first.
        shape = (num_positions, hidden_size) if config.per_position else (hidden_size,)
        self.down_bias = nn.Parameter(torch.empty(shape)) if plain else None

    def forward(self, target: "TargetHost", stream: Stream, rows: BlockRows) -> Stream:
        """One layer.

        Args:
            target: Sums over ranks.
            stream: ``[rows, hidden_size]``.
            rows: How they belong to blocks.
        """
        if self.config.form == "square":
            x = stream.summed()
            return Stream(F.silu(project(self.proj, x, rows)), x)
        if self.config.form == "gated":
            x, residual = self.norm.of_stream(stream)
            inner = F.silu(project(self.gate_proj, x, rows))
            inner = inner * project(self.up_proj, x, rows)
        else:
            x = residual = stream.summed()
            inner = F.relu(project(self.up_proj, x, rows))
        out = target.all_reduce(project(self.down_proj, inner, rows))
        if self.down_bias is not None:
            out = out + self._bias_of(out, rows)
        return Stream(out, residual)

    @property
    def has_biases_by_position(self) -> bool:
        """Whether ``down_bias`` is ``[positions, hidden_size]``."""
        return self.config.form == "plain" and self.config.per_position

    def _bias_of(self, out: torch.Tensor, rows: BlockRows) -> torch.Tensor:
        assert self.down_bias is not None
        bias = self.down_bias.to(out.dtype)
        if not self.config.per_position:
            return bias
        bias = bias[rows.first : rows.first + rows.num_positions]
        return bias.expand(rows.by_block(out).shape).flatten(0, 1)

    def init_weights(self, generator: torch.Generator) -> None:
        """Small random weights; what is added to the stream starts at zero."""
        for name, weight in self.named_parameters():
            if name == "norm.weight":
                nn.init.ones_(weight)
            elif name.startswith(("down_proj", "proj")) or name.endswith("bias"):
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=0.02, generator=generator)


@torch.no_grad()
def set_identity(weight: torch.Tensor) -> None:
    """Make a square map ``[size, size]``, or each of ``[k, size, size]``, pass on what
    it gets."""
    weight.copy_(torch.eye(weight.shape[-1]))


def _normed(norm: Any, stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention or MLP reads, and the stream that it is added to."""
    if norm is None:
        return (summed := stream.summed()), summed
    return norm.of_stream(stream)
