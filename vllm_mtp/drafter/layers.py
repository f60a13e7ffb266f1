# SPDX-License-Identifier: Apache-2.0
"""The two kinds of draft layer: shared with the target, or the drafter's own."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vllm_mtp.drafter.config import OwnLayerConfig, SharedLayerConfig
from vllm_mtp.drafter.lora import LowRankPair, gated, linear_sizes, with_lora
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


class RMSNorm(nn.Module):
    """RMSNorm, rounding where vLLM and transformers round: before the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

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
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(dtype) * self.weight


class SharedLayer(nn.Module):
    """The target's own layer; only the optional LoRA has weights here."""

    def __init__(self, config: SharedLayerConfig, facts: TargetFacts) -> None:
        super().__init__()
        self.target_layer = config.target_layer
        self.facts = facts
        self.lora = nn.ModuleDict()
        if lora := config.lora:
            for name in lora.modules:
                self.lora[name] = LowRankPair(linear_sizes(facts, name), lora)

    def bind(self, target: "TargetHost") -> nn.Module:
        """The module to run on ``target``: its own layer, or a shadow with LoRA."""
        layer = target.layer(self.target_layer)
        if not self.lora:
            return layer
        pairs: Any = self.lora.items()
        return with_lora(layer, pairs, self.facts, target)

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
            gate: ``[rows, 1]``; 1 where LoRA acts.
        """
        layer = gated(bound, gate) if self.lora else bound
        return target.run_layer(layer, self.target_layer, stream, positions)

    def init_weights(self, generator: torch.Generator) -> None:
        for pair in self.lora.values():
            pair.init_weights(generator)  # type: ignore[operator]


class OwnLayer(nn.Module):
    """A Llama-like layer that reads the KV cache of the target layer it is bound to."""

    def __init__(self, config: OwnLayerConfig, facts: TargetFacts) -> None:
        super().__init__()
        self.target_layer = config.target_layer
        self.head_dim = facts.head_dim
        hidden, mlp, eps = (
            facts.hidden_size,
            config.intermediate_size,
            config.rms_norm_eps,
        )
        queries = facts.num_attention_heads * facts.head_dim
        keys = facts.num_key_value_heads * facts.head_dim
        self.boundary_proj = (
            nn.Linear(hidden, hidden, bias=False) if config.boundary_hidden else None
        )
        self.bridge = nn.Linear(hidden, hidden) if config.bridge else None
        self.input_norm = RMSNorm(hidden, eps)
        self.q_proj = nn.Linear(hidden, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, hidden, bias=False)
        self.q_norm = RMSNorm(facts.head_dim, eps) if config.qk_norm else None
        self.k_norm = RMSNorm(facts.head_dim, eps) if config.qk_norm else None
        self.mlp_norm = RMSNorm(hidden, eps)
        self.gate_proj = nn.Linear(hidden, mlp, bias=False)
        self.up_proj = nn.Linear(hidden, mlp, bias=False)
        self.down_proj = nn.Linear(mlp, hidden, bias=False)

    def forward(
        self,
        target: "TargetHost",
        stream: Stream,
        positions: torch.Tensor,
        boundary: torch.Tensor | None,
    ) -> Stream:
        """One layer.

        Args:
            target: Gives RoPE and attention over the bound layer's cache.
            stream: ``[rows, hidden_size]``.
            positions: ``[rows]`` int64.
            boundary: ``[rows, hidden_size]``, the boundary hidden state of each
                row's block; needed only where the layer reads it.
        """
        if self.bridge is not None:
            stream = Stream(self.bridge(stream.summed()))
        if self.boundary_proj is not None:
            assert boundary is not None, "the caller gives what the config asks for"
            added = stream.hidden + self.boundary_proj(boundary)
            stream = Stream(added, stream.residual)
        x, residual = self.input_norm.of_stream(stream)
        stream = Stream(self._attention(target, x, positions), residual)
        x, residual = self.mlp_norm.of_stream(stream)
        return Stream(self._mlp(target, x), residual)

    def _attention(
        self, target: "TargetHost", x: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        query = self._per_head(self.q_norm, self.q_proj(x))
        key = self._per_head(self.k_norm, self.k_proj(x))
        query, key = target.rotate(self.target_layer, positions, query, key)
        heads = target.attend(self.target_layer, query, key, self.v_proj(x))
        return target.all_reduce(self.o_proj(heads))

    def _per_head(self, norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
        if norm is None:
            return x
        return norm(x.unflatten(-1, (-1, self.head_dim))).flatten(-2)

    def _mlp(self, target: "TargetHost", x: torch.Tensor) -> torch.Tensor:
        inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return target.all_reduce(self.down_proj(inner))

    def init_weights(self, generator: torch.Generator) -> None:
        """Small random weights; the outputs start at zero, so an untrained layer
        passes its input through."""
        for name, weight in self.named_parameters():
            if "norm" in name:
                nn.init.ones_(weight)
            elif name == "bridge.weight":
                nn.init.eye_(weight)
            elif name.startswith(("o_proj", "down_proj", "boundary_proj")) or (
                name.endswith("bias")
            ):
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=0.02, generator=generator)
