# SPDX-License-Identifier: Apache-2.0
"""Which of the possible blocks a training step takes."""

import torch


def choose_anchors(
    possible: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor:
    """At most ``count`` of them, at random without repeats, ascending."""
    order = torch.randperm(len(possible), generator=generator)[:count]
    return possible[order.sort().values]


def choose_window(
    possible: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor:
    """At most ``count`` that follow each other, from a random one on, ascending.

    Behind the last one it goes on with the first, so each is taken as often as any
    other, as by `choose_anchors`.
    """
    size = len(possible)
    if count >= size:
        return possible
    start = torch.randint(size, (1,), generator=generator)
    chosen = (start + torch.arange(count)) % size
    return possible[chosen.sort().values]


def generator_for(*numbers: int) -> torch.Generator:
    """A random generator that depends on these numbers alone.

    Anchors then do not depend on what ran before, so a resumed run chooses the same.
    """
    seed = 0
    for number in numbers:
        # Multiplicative hashing; the constant is 2 ** 64 over the golden ratio.
        seed = ((seed ^ number) * 0x9E3779B97F4A7C15 + 1) % 2**64
    return torch.Generator().manual_seed(seed >> 1)
