# SPDX-License-Identifier: Apache-2.0
"""How the target's layers and its last norm treat the residual stream, measured.

vLLM's models share neither a signature nor what it means. Most layers take and give a
stream in two parts that the next norm adds up. Others give the whole stream, alone or
beside a residual that nobody reads any more, and some rotate no keys. A name tells
nothing of it. So the target runs once over a few tokens, which shows how it calls its
layers, and each layer that a drafter reads runs alone on a few rows. All that happens
without the KV cache: attention gives every row its own values.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention

from vllm_mtp.drafter.followed import (
    NUM_TOKENS,
    LayerCall,
    difference,
    some_tokens,
    watched,
)
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.serving.layer_calls import first_of

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


class TargetRun(NamedTuple):
    """What the target computed for `NUM_TOKENS` tokens, T."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    calls: dict[int, LayerCall]  # by layer
    hidden: torch.Tensor  # [T, hidden_size], what the model gives
    logits: torch.Tensor  # [T, V]


@torch.inference_mode()
def run_target(
    model: Any, text_part: Any, decoder: Any, vocab_size: int, vllm_config: VllmConfig
) -> TargetRun:
    """Run the target over a few tokens and keep what its layers are given and give.

    Args:
        model: The runner's target.
        text_part: What of it embeds tokens and gives logits.
        decoder: What of that has the layers.
        vocab_size: Of the target.
        vllm_config: The target's.

    Raises:
        UnsupportedTargetError: It cannot be run so.
    """
    layers = decoder.layers
    device = next(decoder.parameters()).device
    ids = some_tokens(vocab_size, device)
    positions = torch.arange(len(ids), device=device)
    try:
        with (
            _finite_states(layers),
            watched(layers) as calls,
            attention_of_values(decoder),
            # Compiled for these few rows it would be compiled anew for a step's.
            set_forward_context(
                None, vllm_config, num_tokens=len(ids), skip_compiled=True
            ),
        ):
            hidden = first_of(text_part(ids, positions))
            logits = model.compute_logits(hidden)
    except Exception as error:  # of the model's own code
        raise UnsupportedTargetError(
            f"{type(model).__name__} cannot be run over a few tokens to see how it "
            f"calls its layers ({type(error).__name__}: {_first_line(error)}); this "
            "architecture is not supported"
        ) from None
    if missing := sorted(set(range(len(layers))) - set(calls)):
        raise UnsupportedTargetError(
            f"{type(model).__name__} does not run its layers {missing} for every "
            "token; this architecture is not supported"
        )
    return TargetRun(ids, positions, calls, hidden, logits)


@contextmanager
def _finite_states(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let layers without attention give numbers.

    Without a cache some give what happens to be in memory.
    """

    def clean(result: Any) -> Any:
        if isinstance(result, tuple):
            return tuple(map(clean, result))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            return result.nan_to_num(0.0, 0.0, 0.0).clamp(-_FAR, _FAR)
        return result

    hooks = [
        layer.register_forward_hook(lambda _, __, result: clean(result))
        for layer in layers
        if not any(isinstance(part, Attention) for part in layer.modules())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def attention_of_values(
    module: nn.Module, keys: list[torch.Tensor] | None = None
) -> Iterator[None]:
    """Let the attention in ``module`` give each row its own values.

    Args:
        module: Its `Attention` modules are meant.
        keys: What they are given is kept here, ``[rows, kv_heads * head_dim]`` each.
    """
    attentions = [part for part in module.modules() if isinstance(part, Attention)]
    for attention in attentions:
        # Not a hook, which a direct call of `forward` goes around.
        attention.forward = partial(_own_values, attention, keys)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for attention in attentions:
            del attention.forward


def _own_values(
    attention: Any,
    keys: list[torch.Tensor] | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    rows, kv_heads = len(query), attention.num_kv_heads
    if value is None:  # it reads another layer's
        return query.new_zeros(rows, attention.num_heads * attention.head_size_v)
    if keys is not None:
        keys.append(key.reshape(rows, -1).clone())
    values = value.reshape(rows, kv_heads, -1)
    return values.repeat_interleave(attention.num_heads // kv_heads, dim=1).flatten(1)


def layer_ways(
    layer: nn.Module,
    call: Callable[..., Any],
    hidden_size: int,
    dtype: torch.dtype,
    vllm_config: VllmConfig,
) -> LayerWays:
    """Measure a decoder layer with ordinary attention.

    Args:
        layer: The target's; left as it is.
        call: Runs it on ``hidden``, ``residual`` (or None) and ``positions``.
        hidden_size: Width of the stream.
        dtype: Of the stream.
        vllm_config: The target's.

    Raises:
        UnsupportedTargetError: The layer cannot be run, or treats the residual in
            a third way.
    """
    name = type(layer).__name__
    run = _Run(layer, call, vllm_config)
    hidden, residual, other = random_rows(3, hidden_size, dtype, _device(layer))
    try:
        summed = run(hidden + residual, None, 0)
        far = run(hidden + residual, None, _far_position(vllm_config))
        rotates = difference(far.keys, summed.keys) > _NOISE
        if not summed.is_pair:
            _require_finite(name, dtype, summed.stream, far.keys)
            return LayerWays(carries_residual=False, rotates=rotates)
        given = run(hidden, residual, 0)
        given_other = run(hidden, other, 0)
    except UnsupportedTargetError:
        raise
    except Exception as error:  # of the model's own code
        raise UnsupportedTargetError(
            f"a layer of the target ({name}) cannot be run by itself "
            f"({type(error).__name__}: {_first_line(error)}); this architecture is "
            "not supported"
        ) from None
    _require_finite(name, dtype, summed.stream, given.stream, far.keys)
    unread = difference(given_other.stream, given.stream)
    added = difference(summed.stream, given.stream)
    if unread < added and unread <= _NOISE:
        return LayerWays(carries_residual=False, rotates=rotates)
    if added < unread and added <= _CLOSE:
        return LayerWays(carries_residual=True, rotates=rotates)
    raise UnsupportedTargetError(
        f"a layer of the target ({name}) neither adds the residual that it is given "
        "nor leaves it out; this architecture is not supported"
    )


def _require_finite(name: str, dtype: torch.dtype, *found: torch.Tensor) -> None:
    if not all(math.isfinite(float(rows.float().abs().max())) for rows in found):
        raise UnsupportedTargetError(
            f"a layer of the target ({name}) gives NaN or infinity for random rows, so "
            f"how it treats its residual cannot be seen; use another dtype than {dtype}"
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
    hidden, residual = random_rows(2, hidden_size, dtype, device)
    with torch.inference_mode():
        expected = first_of(norm(hidden + residual))
        try:
            found = first_of(norm(hidden.clone(), residual.clone()))
        except TypeError:  # it takes one
            return False
    return difference(found, expected) <= _NOISE


def stream_of(result: Any, carries_residual: bool) -> torch.Tensor:
    """The whole stream in a layer's result. ``[rows, hidden_size]``."""
    if carries_residual and result[1] is not None:
        return result[0].float() + result[1].float()
    return first_of(result)


class _Result(NamedTuple):
    stream: torch.Tensor  # [rows, hidden_size], with the residual
    keys: torch.Tensor  # [rows, kv_heads * head_dim]
    is_pair: bool  # of hidden states and residual


class _Run:
    """One layer, on its own."""

    def __init__(
        self, layer: nn.Module, call: Callable[..., Any], vllm_config: VllmConfig
    ) -> None:
        self._layer = layer
        self._call = call
        self._vllm_config = vllm_config

    @torch.inference_mode()
    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, position: int
    ) -> _Result:
        keys: list[torch.Tensor] = []
        rows = len(hidden)
        with (
            attention_of_values(self._layer, keys),
            set_forward_context(None, self._vllm_config, num_tokens=rows),
        ):
            result = self._call(
                # Fused norms write into what they are given.
                hidden.clone(),
                None if residual is None else residual.clone(),
                torch.full((rows,), position, device=hidden.device),
            )
        is_pair = isinstance(result, tuple) and len(result) == 2
        if not (is_pair or isinstance(result, torch.Tensor)) or not keys:
            raise UnsupportedTargetError(
                f"a layer of the target ({type(self._layer).__name__}) does not give "
                "hidden states from one attention; this architecture is not supported"
            )
        return _Result(stream_of(result, is_pair), keys[0], is_pair)


def random_rows(
    count: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """The same on every rank. ``[NUM_TOKENS, hidden_size]`` each."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, NUM_TOKENS, hidden_size, generator=generator)
    return list(rows.to(device, dtype))


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _far_position(vllm_config: VllmConfig) -> int:
    return min(_FAR, vllm_config.model_config.max_model_len - 1)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
