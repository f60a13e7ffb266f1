# SPDX-License-Identifier: Apache-2.0
"""Whether a host computes what its target computes, seen before anything is drafted.

Models differ in more than a list of their names or settings could say. So the target
runs once over a few tokens, what goes into and comes out of its layers is kept, and a
host's own way (embedding, layers, norm, head) must give the same.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from vllm_mtp.drafter.host import TargetHost
from vllm_mtp.drafter.layers import Stream
from vllm_mtp.errors import UnsupportedTargetError

NUM_TOKENS = 24  # in a row, and so many that RoPE shows
# Relative differences, above what kernels make of them, and what low precision does.
_MOST_FLOAT32 = 5e-3
_MOST_ROUNDED = 0.1


def last_norm_of(decoder: Any) -> Any:
    """The norm behind a decoder's layers, or None."""
    names = ("norm", "norm_f", "final_layernorm", "ln_f")
    return next((n for name in names if (n := getattr(decoder, name, None))), None)


class LayerCall(NamedTuple):
    """How a model called one of its layers, and what it got."""

    arguments: dict[str, Any]  # by the names of the layer's parameters
    result: Any


@contextmanager
def watched(layers: Sequence[nn.Module]) -> Iterator[dict[int, LayerCall]]:
    """Keep the last call of each layer in the forward inside the block.

    Tensors are copies, since models write into what they are given.
    """
    calls: dict[int, LayerCall] = {}
    before: dict[int, dict[str, Any]] = {}

    def keep_arguments(
        index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        bound = inspect.signature(layer.forward).bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        before[index] = {name: _copy(value) for name, value in arguments.items()}

    def keep_result(index: int, result: Any) -> None:
        calls[index] = LayerCall(before.pop(index), _copy(result))

    hooks = []
    for index, layer in enumerate(layers):
        hooks += [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, i=index: keep_arguments(
                    i, module, args, kwargs
                ),
                with_kwargs=True,
            ),
            layer.register_forward_hook(
                lambda _, __, result, i=index: keep_result(i, result)
            ),
        ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        return tuple(map(_copy, value))
    return value


class Seen(NamedTuple):
    """What a target computed for T tokens."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    entering: Sequence[torch.Tensor]  # by layer, [T, hidden_size]: the stream before it
    leaving: Sequence[torch.Tensor]  # by layer, [T, hidden_size]: the stream behind it
    hidden: torch.Tensor  # [T, hidden_size], after the final norm
    logits: torch.Tensor  # [T, V]


def require_followed(
    host: TargetHost, seen: Seen, layers: Iterable[int], rows: slice, name: str
) -> None:
    """Refuse a target of which a host computes something else.

    Args:
        host: Ready to run rows behind the prefixes that the target had.
        seen: What the target computed.
        layers: Those that the host must give as the target did.
        rows: Of the tokens, those that layers can be run on.
        name: The target's, for messages.

    Raises:
        UnsupportedTargetError: Names the part that differs first.
    """

    exact = seen.hidden.dtype == torch.float32
    most = _MOST_FLOAT32 if exact else _MOST_ROUNDED

    def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float(_differences(found, expected).max())

    def require(
        found: torch.Tensor,
        expected: torch.Tensor,
        part: str,
        measure: Callable[[torch.Tensor, torch.Tensor], float] = largest,
    ) -> None:
        error = measure(found, expected)
        if not error <= most:  # as "not at most", since NaN is neither
            raise UnsupportedTargetError(
                f"target {name!r} computes something that a drafter would leave out: "
                f"{part} differ by {error:.2g} (relative) from what its layers, one by "
                f"one, give; expected {most} at most. Drafts would be wrong, so it is "
                "not supported; use another target"
            )

    require(host.embed(seen.token_ids), seen.entering[0], "what enters its layers")
    for index in range(1, len(seen.entering)):
        part = f"the rows between its layers {index - 1} and {index}"
        require(seen.leaving[index - 1], seen.entering[index], part)
    positions = seen.positions[rows]
    for index in layers:
        stream = Stream(seen.entering[index][rows])
        stream = host.run_layer(host.layer(index), index, stream, positions)
        left = seen.leaving[index][rows]
        # Layers alone may hold a mixture of experts.
        require(stream.summed(), left, f"rows behind layer {index}", difference)
    last = host.final_norm(Stream(seen.leaving[-1]))
    require(last, seen.hidden, "its last hidden states")
    require(host.logits(seen.hidden), seen.logits, "its logits")


def embedding_scale(embedded: torch.Tensor, entering: torch.Tensor) -> float:
    """What the target multiplies its embeddings with before its first layer.

    Args:
        embedded: ``[T, hidden_size]``, what its embedding gives.
        entering: ``[T, hidden_size]``, what its first layer is given.

    Returns:
        1 where the one is not the other times a number; then they differ, and
        `require_followed` says so.
    """
    rounded = entering.dtype != torch.float32
    embedded, entering = embedded.double(), entering.double()
    scale = float((embedded * entering).sum() / embedded.square().sum())
    if rounded:
        scale = float(f"{scale:.3g}")  # the rest is what 16 bits leave
    is_scaled = difference(embedded * scale, entering) < 1e-2
    return scale if is_scaled and abs(scale - 1) > 1e-2 else 1.0


def some_tokens(vocab_size: int, device: torch.device) -> torch.Tensor:
    """Ids of the whole vocabulary. ``[NUM_TOKENS]`` int64."""
    step = max(1, vocab_size // (NUM_TOKENS + 1))
    return (torch.arange(NUM_TOKENS, device=device) + 1) * step % vocab_size


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference of the rows, in the middle.

    One row may differ by much: a mixture of experts can be close to another choice.
    """
    return float(_differences(found, expected).median())


def _differences(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative difference of each row, of those that have a length; NaN for few."""
    found, expected = found.double().flatten(1), expected.double().flatten(1)
    lengths = expected.norm(dim=1)
    usable = lengths.isfinite() & (lengths > 0)  # unused tokens are often zeros
    if 2 * usable.sum() < len(usable):
        return lengths.new_full((1,), torch.nan)
    return (found - expected).norm(dim=1)[usable] / lengths[usable]
