# SPDX-License-Identifier: Apache-2.0
"""Where blocks stand in a training text."""

from collections.abc import Sequence

import torch

from vllm_mtp.block import anchors_of


def possible_anchors(spans: Sequence[Sequence[int]], num_tokens: int) -> torch.Tensor:
    """Every place of a text where a block has something to learn.

    The anchor is one of the target's own tokens, and so is the token behind it.

    Args:
        spans: ``[start, end)`` of the target's own tokens.
        num_tokens: T; what lies behind is cut off.

    Returns:
        ``[A]`` int64, ascending; a block needs a prefix of at least one token.
    """
    usable = (anchors_of((start, min(end, num_tokens))) for start, end in spans)
    return torch.tensor([n for span in usable for n in span], dtype=torch.int64)


def span_ends(
    anchors: torch.Tensor, spans: Sequence[Sequence[int]], num_tokens: int
) -> torch.Tensor:
    """Where the span that each anchor lies in ends. ``[A]`` int64."""
    ends = torch.zeros_like(anchors)
    for start, end in spans:
        ends[(anchors >= start) & (anchors < end)] = min(end, num_tokens)
    return ends


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
