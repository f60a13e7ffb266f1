# SPDX-License-Identifier: Apache-2.0
"""Noise tokens: random ids whose embeddings stand at the placeholders' positions.

As in Uno (arXiv 2609.04010; the range is that of ``nano_vllm_uno/engine/noise.py`` in
github.com/ifm-ai/uno: uniform from 1 up to the mask token's id, which is left out).
"""

import torch

from vllm_mtp.drafter.config import NoiseConfig


def draw_noise(
    low: int, high: int, shape: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor:
    """Uniform token ids from ``low`` to ``high`` - 1. ``shape``, int64."""
    return torch.randint(low, high, shape, generator=generator)


def draw_noise_config(low: int, high: int, count: int, seed: int) -> NoiseConfig:
    """The tokens of a drafter's placeholders, which follow from the seed alone.

    Args:
        low: Least id.
        high: Ids are below this one.
        count: How many.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = tuple(draw_noise(low, high, (count,), generator).tolist())
    return NoiseConfig(low=low, high=high, token_ids=ids)
