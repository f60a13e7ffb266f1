# SPDX-License-Identifier: Apache-2.0
"""How the target's layers and its last norm treat the residual stream, measured.

vLLM's models share a signature and not its meaning. Most layers take and give a
stream in two parts that the next norm adds up. Others give the whole stream beside
a residual that nobody reads any more, and some rotate no keys. A name tells nothing
of it, so each module runs once on a few rows, without the KV cache.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention

from vllm_mtp.drafter.shadow import shadow
from vllm_mtp.errors import UnsupportedTargetError

_ROWS = 8
# A part that is read changes the result by about its own size, one that is not read
# by what kernels differ from run to run.
_NOISE = 0.05
# The same sum, rounded before or behind the norm, and quantised from there.
_CLOSE = 0.5
_FAR = 1000


class LayerWays(NamedTuple):
    """How a decoder layer reads its arguments."""

    carries_residual: bool
    """Whether the stream is ``hidden + residual``, in and out; else ``hidden``."""
    rotates: bool
    """Whether its keys depend on their positions."""


def layer_ways(
    layer: nn.Module, hidden_size: int, dtype: torch.dtype, vllm_config: VllmConfig
) -> LayerWays:
    """Measure a decoder layer with ordinary attention.

    Args:
        layer: The target's; left as it is.
        hidden_size: Width of the stream.
        dtype: Of the stream.
        vllm_config: The target's.

    Raises:
        UnsupportedTargetError: The layer cannot be run, or treats the residual in
            a third way.
    """
    name = type(layer).__name__
    run = _Run(layer, vllm_config)
    hidden, residual, other = _random_rows(3, hidden_size, dtype, _device(layer))
    try:
        given = run(hidden, residual, 0)
        given_other = run(hidden, other, 0)
        summed = run(hidden + residual, None, 0)
        far = run(hidden + residual, None, _far_position(vllm_config))
    except UnsupportedTargetError:
        raise
    except Exception as error:  # of the model's own code
        raise UnsupportedTargetError(
            f"a layer of the target ({name}) cannot be run by itself "
            f"({type(error).__name__}: {_first_line(error)}); this architecture is "
            "not supported"
        ) from None
    unread = difference(given_other.stream, given.stream)
    added = difference(summed.stream, given.stream)
    turned = difference(far.keys, summed.keys)
    if not math.isfinite(unread + added + turned):
        raise UnsupportedTargetError(
            f"a layer of the target ({name}) gives NaN or infinity for random rows, so "
            f"how it treats its residual cannot be seen; use another dtype than {dtype}"
        )
    rotates = turned > _NOISE
    if unread < added and unread <= _NOISE:
        return LayerWays(carries_residual=False, rotates=rotates)
    if added < unread and added <= _CLOSE:
        return LayerWays(carries_residual=True, rotates=rotates)
    raise UnsupportedTargetError(
        f"a layer of the target ({name}) neither adds the residual that it is given "
        "nor leaves it out; this architecture is not supported"
    )


def norm_adds_residual(
    norm: nn.Module, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether ``norm(hidden, residual)`` is the norm of their sum.

    Args:
        norm: The target's last norm; any that takes ``hidden`` alone.
        hidden_size: Width of the stream.
        dtype: Of the stream.
        device: Where the target is.
    """
    hidden, residual = _random_rows(2, hidden_size, dtype, device)
    with torch.inference_mode():
        expected = first_of(norm(hidden + residual))
        try:
            found = first_of(norm(hidden.clone(), residual.clone()))
        except TypeError:  # it takes one
            return False
    return difference(found, expected) <= _NOISE


def first_of(result: Any) -> torch.Tensor:
    """What a module gives, without what it gives beside it."""
    return result[0] if isinstance(result, tuple) else result


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference of the rows, in the middle.

    One row may differ by much: a mixture of experts can be close to another choice.
    """
    found, expected = found.float().flatten(1), expected.float().flatten(1)
    relative = (found - expected).norm(dim=1) / expected.norm(dim=1)
    return float(relative.median())


class _Result(NamedTuple):
    stream: torch.Tensor  # [rows, hidden_size], with the residual
    keys: torch.Tensor  # [rows, kv_heads * head_dim]


class _Run:
    """One layer, on its own, with a stand-in for its attention."""

    def __init__(self, layer: nn.Module, vllm_config: VllmConfig) -> None:
        self._name = type(layer).__name__
        self._vllm_config = vllm_config
        self._keys: list[torch.Tensor] = []
        stand_ins = {
            path: _OwnValue(module, self._keys)
            for path, module in layer.named_modules()
            if isinstance(module, Attention)
        }
        self._layer = shadow(layer, stand_ins)

    @torch.inference_mode()
    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, position: int
    ) -> _Result:
        self._keys.clear()
        rows = len(hidden)
        with set_forward_context(None, self._vllm_config, num_tokens=rows):
            result = self._layer(
                positions=torch.full((rows,), position, device=hidden.device),
                # Fused norms write into what they are given.
                hidden_states=hidden.clone(),
                residual=None if residual is None else residual.clone(),
            )
        if not (isinstance(result, tuple) and len(result) == 2) or not self._keys:
            raise UnsupportedTargetError(
                f"a layer of the target ({self._name}) does not give a pair (hidden "
                "states, residual) from one attention; this architecture is not "
                "supported"
            )
        hidden, residual = result
        stream = hidden if residual is None else hidden.float() + residual.float()
        return _Result(stream, self._keys[0])


class _OwnValue(nn.Module):
    """Attention of rows that read themselves alone; keeps the keys."""

    def __init__(self, attention: Attention, keys: list[torch.Tensor]) -> None:
        super().__init__()
        self._modules["attention"] = attention
        self._keys = keys

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        rows, heads = len(value), self.attention.num_heads
        kv_heads = self.attention.num_kv_heads
        self._keys.append(key.reshape(rows, -1).clone())
        values = value.reshape(rows, kv_heads, -1)
        return values.repeat_interleave(heads // kv_heads, dim=1).flatten(1)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("attention"), name)


def _random_rows(
    count: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """The same on every rank. ``[_ROWS, hidden_size]`` each."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, _ROWS, hidden_size, generator=generator)
    return list(rows.to(device, dtype))


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _far_position(vllm_config: VllmConfig) -> int:
    return min(_FAR, vllm_config.model_config.max_model_len - 1)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
