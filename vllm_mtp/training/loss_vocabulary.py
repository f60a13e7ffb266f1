# SPDX-License-Identifier: Apache-2.0
"""The tokens that a training step scores.

Scoring the whole vocabulary for every label costs more than the drafter's body
does on a small target. A step can score the target's most frequent tokens plus
all labels of its batch instead; serving still drafts over everything.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from vllm_mtp.drafter.layout import IGNORE_LABEL


class LossVocabulary:
    """Some tokens of the target's vocabulary, and where each stands among them.

    Args:
        token_ids: ``[C]`` int64, different ones.
        vocab_size: Size of the target's vocabulary.
    """

    def __init__(self, token_ids: torch.Tensor, vocab_size: int) -> None:
        self.token_ids = token_ids
        self._column = torch.full(
            (vocab_size,), IGNORE_LABEL, dtype=torch.int64, device=token_ids.device
        )
        self._column[token_ids] = torch.arange(len(token_ids), device=token_ids.device)

    def columns(self, labels: torch.Tensor) -> torch.Tensor:
        """Token ids to candidate numbers, any shape; ``IGNORE_LABEL`` stays, and
        stands for tokens that are no candidates."""
        found = self._column[labels.clamp(min=0)]
        return found.masked_fill(labels == IGNORE_LABEL, IGNORE_LABEL)

    def with_labels(self, labels: torch.Tensor) -> "LossVocabulary":
        """These and all that ``labels`` holds."""
        wanted = labels[labels != IGNORE_LABEL].unique()
        more = wanted[self._column[wanted] == IGNORE_LABEL]
        if not len(more):
            return self
        return LossVocabulary(torch.cat([self.token_ids, more]), len(self._column))


def own_token_counts(rows: Iterable[Mapping[str, Any]]) -> Counter[int]:
    """How often each token stands in the target's own part of the texts."""
    counts: Counter[int] = Counter()
    for row in rows:
        for start, end in row["loss_spans"]:
            counts.update(row["input_ids"][start:end])
    return counts
