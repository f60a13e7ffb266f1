# SPDX-License-Identifier: Apache-2.0
"""What a request's seed promises, for drafts on the V1 runner.

vLLM's proposer draws all drafts from the process's one generator, so a seeded request
gets other drafts, and then another text, each time. Here its drafts follow from its
seed and their positions in its text alone. The request's own generator, which
verification uses, is left alone: how often that was asked depends on the pieces that
the prompt was cut into, and so on the requests beside it.
"""

import itertools
from collections.abc import Mapping

import torch

from vllm_mtp.drafter.heads import Pick

_WIDTH = 64
_INCREMENT = 0x9E3779B97F4A7C15
_FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
# Of the bits of a float64 below 1.
_UNIFORM_BITS = 53
# So that the numbers of drafts are none that vLLM draws from the same seed.
_DRAFTS = 0x6D74705F64726166


def with_seeds(
    pick: Pick, generators: Mapping[int, torch.Generator], starts: torch.Tensor
) -> Pick:
    """A sampler that draws the tokens of seeded rows by their seeds.

    Args:
        pick: Draws for all rows, and keeps their distributions.
        generators: Of the rows that have a seed; nothing else of them is used.
        starts: ``[B]`` int64; position of each row's first draft.

    Returns:
        To be called as ``pick``: once per position of the block, from left to right.
    """
    if not generators:
        return pick
    rows = sorted(generators)
    # With numbers, not from a tensor of the host: nothing waits for a GPU.
    seeds = torch.stack(
        [starts.new_full((), _signed(generators[row].initial_seed())) for row in rows]
    )
    starts = torch.stack([starts[row] for row in rows])
    columns = itertools.count()

    def seeded(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens, probs = pick(logits)
        positions = starts + next(columns)
        if probs is None:  # nothing was drawn
            return tokens, probs
        # Of their rows alone: the noise is as large as the vocabulary.
        of_seeded = torch.stack([probs[row] for row in rows])
        noise = exponential_noise(seeds, positions, probs.shape[-1], probs.dtype)
        drawn, tokens = (of_seeded / noise).argmax(dim=-1), tokens.clone()
        for index, row in enumerate(rows):
            tokens[row] = drawn[index]
        return tokens, probs

    return seeded


def exponential_noise(
    seeds: torch.Tensor, positions: torch.Tensor, size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Exponentially distributed numbers that follow from seed and position.

    Args:
        seeds: ``[B]`` int64.
        positions: ``[B]`` int64.
        size: V.
        dtype: Of the numbers.

    Returns:
        ``[B, V]``, all above 0 and finite.
    """
    keys = _mixed(_mixed(seeds ^ _signed(_DRAFTS)) + positions)
    steps = torch.arange(1, size + 1, device=seeds.device) * _signed(_INCREMENT)
    bits = _shifted(_mixed(keys[:, None] + steps), _WIDTH - _UNIFORM_BITS)
    # Most exact near 0, where the number that decides a draw lies; and below 1.
    uniform = bits.to(dtype).add_(0.5).mul_(2.0**-_UNIFORM_BITS)
    uniform.clamp_(max=1 - torch.finfo(dtype).eps)
    return uniform.neg_().log1p_().neg_()


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """SplitMix64's last step: every bit depends on every bit. int64."""
    for shift, factor in _FACTORS:
        numbers = (numbers ^ _shifted(numbers, shift)) * _signed(factor)
    return numbers ^ _shifted(numbers, _LAST_SHIFT)


def _shifted(numbers: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, with zeros from the left. int64."""
    return (numbers >> by) & ((1 << (_WIDTH - by)) - 1)


def _signed(number: int) -> int:
    """An unsigned number of 64 bits, as int64 holds it."""
    half = 1 << (_WIDTH - 1)
    return (number + half) % (2 * half) - half
