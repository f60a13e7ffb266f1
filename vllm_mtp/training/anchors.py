# SPDX-License-Identifier: Apache-2.0
"""Which of the possible blocks a training step takes."""

import torch


def choose_anchors(
    possible: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor:
    """At most ``count`` of them, at random without repeats, ascending."""
    order = torch.randperm(len(possible), generator=generator)[:count]
    return possible[order.sort().values]


def generator_for(*numbers: int) -> torch.Generator:
    """A random generator that depends on these numbers alone.

    Anchors then do not depend on what ran before, so a resumed run chooses the same.
    """
    seed = 0
    for number in numbers:
        # Multiplicative hashing; the constant is 2 ** 64 over the golden ratio.
        seed = ((seed ^ number) * 0x9E3779B97F4A7C15 + 1) % 2**64
    return torch.Generator().manual_seed(seed >> 1)
