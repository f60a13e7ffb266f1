# SPDX-License-Identifier: Apache-2.0
"""Verifying a draft and making the next one in one forward: computed, not run.

A drafter that is the target itself, with trained rows, needs no forward of its own:
behind each token that is verified, the same forward carries a group of mask rows, and
the group behind the last accepted token is the next draft (blockwise parallel decoding,
arXiv 1811.03115; BiTA, 2401.12522; I-DLM, 2604.11035). A step is then one forward of
the target in place of two, with many more rows.

Here stands what that would give, from drafts that were measured: a block behind an
anchor whose first row is the target's own. In two forwards, all of its k tokens are
drafts and the verifying forward adds one. Merged, its first row is the verifying one,
whose token is the target's word, and the k - 1 rows behind it are the masks of the
group: they draft the same tokens from the same rows, so what is accepted of them is
known.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.evaluation.offline import walk
from vllm_mtp.metrics import AcceptanceCounts, mean_length
from vllm_mtp.torch_host.texts import anchors_are_exact


@dataclass(frozen=True)
class ForwardCost:
    """Decoding by one way, in forwards of the target.

    Attributes:
        tokens_per_step: Between two verifications.
        forwards_per_step: Of the target, the draft's included.
        rows_per_step: In all of these.
    """

    tokens_per_step: float
    forwards_per_step: int
    rows_per_step: int

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens_per_step / self.forwards_per_step

    @property
    def rows_per_token(self) -> float:
        return self.rows_per_step / self.tokens_per_step


def is_mergeable(config: DrafterConfig) -> bool:
    """Whether a drafter's rows can stand in the target's own forward, whose tokens are
    then the first drafts: it is the whole target with trained rows."""
    whole_head = config.draft_vocab_size is None and config.lm_head == "target"
    return anchors_are_exact(config) and whole_head


def in_two_forwards(lengths: Iterable[Sequence[int]], k: int) -> ForwardCost:
    """A forward of k rows that drafts, and one of k + 1 that verifies.

    Args:
        lengths: Of `accepted_lengths`, from drafts of at least k tokens.
        k: Tokens drafted per step.
    """
    counts = _sum((walk(of_answer, k) for of_answer in lengths), k)
    return ForwardCost(mean_length(counts), 2, 2 * k + 1)


def merged(lengths: Iterable[Sequence[int]], k: int) -> ForwardCost:
    """One forward of k tokens that are verified, each with k - 1 masks behind it.

    Args:
        lengths: As in `in_two_forwards`, of a drafter that `is_mergeable`: the first
            draft is then the target's own token.
        k: Rows of a block, its first one included.
    """
    masks = k - 1
    behind_first = ([max(n - 1, 0) for n in of_answer] for of_answer in lengths)
    counts = _sum((walk(of_answer, masks) for of_answer in behind_first), masks)
    return ForwardCost(mean_length(counts), 1, k + k * masks)


def _sum(counts: Iterable[AcceptanceCounts], k: int) -> AcceptanceCounts:
    return reduce(add, counts, AcceptanceCounts(0, 0, (0,) * k))
