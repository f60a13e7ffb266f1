# SPDX-License-Identifier: Apache-2.0
"""The labels of a whole optimizer step, wherever its blocks are computed.

A loss is a mean over the blocks of a step, for each position, and these are spread over
processes and accumulated batches. Such parts do not have as many labels each: an answer
may end within a block. So a mean of their means is another loss than that of all blocks
at once. Every part therefore divides by the counts of the whole step, and the parts'
losses and gradients are summed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_mtp.drafter.layout import IGNORE_LABEL
from vllm_mtp.training.loss_vocabulary import LossVocabulary


class StepLabels(NamedTuple):
    """What a part of a step needs to know of all of them."""

    counts: torch.Tensor  # [k] int64, labels that are scored at each position
    positions: torch.Tensor  # [k] int64, labels at each of these, scored or not
    total: torch.Tensor  # [] int64, labels of all positions, scored or not
    blocks: torch.Tensor  # [] int64, all of them
    # [m] int64, each once: the scored labels, where these become candidates; else none
    tokens: torch.Tensor


def step_labels(
    labels: torch.Tensor,
    first: int,
    candidates: LossVocabulary | None,
    adds_labels: bool,
    vocab_size: int,
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
) -> StepLabels:
    """Gather what the processes of a run have to know of each other's labels.

    Args:
        labels: ``[B, k]`` int64, those of this process.
        first: The first position that is scored.
        candidates: Tokens that are scored; None for all.
        adds_labels: Whether labels are added to the candidates.
        vocab_size: Of the target.
        sum_over_processes: Takes and gives an int64 tensor ``[n]``.
    """
    scored = labels[:, first:]
    positions = (scored != IGNORE_LABEL).sum(0)
    if candidates is not None and not adds_labels:
        scored = candidates.columns(scored)
    valid = scored != IGNORE_LABEL
    total = (labels != IGNORE_LABEL).sum()
    blocks = total.new_tensor(len(labels))
    counts = torch.cat([valid.sum(0), positions, torch.stack([total, blocks])])
    seen = counts.new_zeros(vocab_size if candidates and adds_labels else 0)
    if len(seen):
        seen[scored[valid]] = 1
    summed = sum_over_processes(torch.cat([counts, seen]))
    scored, positions = summed[: len(counts) - 2].chunk(2)
    total, blocks = summed[len(counts) - 2 : len(counts)]
    tokens = summed[len(counts) :].nonzero()[:, 0]
    return StepLabels(scored, positions, total, blocks, tokens)
