# SPDX-License-Identifier: Apache-2.0
"""Sketches: a few numbers that tell whether two hidden states are the same.

A hidden state is multiplied with a fixed matrix of random signs. The length of the
difference of two sketches estimates the length of the difference of the states, so a
sketch shows not only that two states differ, but by how much.
"""

import hashlib
from functools import lru_cache

import torch

_SIZE = 16
# Part of the probe's format: with another seed, old probes mean nothing.
_SEED = b"vllm-mtp sketch 1"


def sketch(states: torch.Tensor) -> torch.Tensor:
    """Sketch every row.

    Args:
        states: ``[rows, size]``, any floating-point type and device.

    Returns:
        ``[rows, 17]`` float32 on the CPU: 16 projections, then the row's norm.
    """
    wide = states.detach().cpu().double()
    projected = wide @ _signs(wide.shape[-1]).double()
    return torch.cat([projected, wide.norm(dim=-1, keepdim=True)], dim=-1).float()


def relative_errors(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Estimated length of the difference, relative to the expected state's length.

    Args:
        got: Sketches ``[..., 17]``.
        expected: Sketches of the same shape.

    Returns:
        ``[...]``; infinite where a sketch is not finite.
    """
    difference = (got - expected).double()
    length = difference[..., :-1].norm(dim=-1) / _SIZE**0.5
    worse = torch.maximum(length, difference[..., -1].abs())
    errors = worse / expected[..., -1].double().clamp(min=1e-12)
    return errors.nan_to_num(nan=float("inf"))


@lru_cache
def _signs(size: int) -> torch.Tensor:
    """The fixed matrix, ``[size, 16]`` int8 of 1 and -1.

    Made by a hash: PyTorch's random numbers may change between versions.
    """
    data = hashlib.shake_256(_SEED + size.to_bytes(8, "big")).digest(size * _SIZE // 8)
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    bits = (flat[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.to(torch.int8).mul(2).sub(1).view(size, _SIZE)
