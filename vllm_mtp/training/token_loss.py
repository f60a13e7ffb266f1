# SPDX-License-Identifier: Apache-2.0
"""From last hidden states to the loss of the tokens, a slice of the blocks at a time.

Logits take rows times vocabulary: for a large target they would be most of a training
step's memory. So a slice's loss and its gradient are computed together and its logits
dropped, as in fused losses (Liger Kernel, arXiv 2410.10989). Those know cross-entropy
alone; ours also has the Markov correction, the teacher and weights per position.

Dimensions: B blocks, k positions, C candidate tokens.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.layout import IGNORE_LABEL, block_positions
from vllm_mtp.torch_host.at_once import is_cpu
from vllm_mtp.torch_host.texts import TextBlocks
from vllm_mtp.training.loss_vocabulary import LossVocabulary
from vllm_mtp.training.objective import (
    Objective,
    Teacher,
    label_weights,
    position_losses,
    weighted_sum,
)
from vllm_mtp.training.step_labels import StepLabels

# Logits of a slice. A GPU wants large products.
_CPU_LOGITS, GPU_LOGITS = 2**23, 2**26

Head = Callable[[torch.Tensor], torch.Tensor]


class _Slice(NamedTuple):
    """Blocks that are scored together."""

    texts: Sequence[tuple[TextBlocks, slice]]  # each text, and which of its blocks
    of_all: slice  # among those of all texts


class _TargetRows(NamedTuple):
    """The target's last hidden states at the positions of blocks."""

    hidden: torch.Tensor  # [N, hidden_size]
    where: torch.Tensor  # [B, k] int64, which of them


class Spans(NamedTuple):
    """What a drafter drafts behind its anchors, and its target's answer to it."""

    tokens: torch.Tensor  # [B, k] int64, as drafted
    # [B, k] int64, the target's likeliest tokens, each behind the drafted ones before
    said: torch.Tensor
    hidden: torch.Tensor  # [B, k, hidden_size], what `said` was made from


class TokenLoss:
    """The losses of drafted tokens.

    Args:
        bound: The drafter on its target.
        candidates: Tokens that are scored, besides those of the labels; None for the
            whole output vocabulary. A drafter with a reduced vocabulary scores that.
    """

    def __init__(self, bound: BoundDrafter, candidates: LossVocabulary | None) -> None:
        self._bound = bound
        vocab = bound.drafter.draft_vocab
        if vocab is not None:
            vocab_size = bound.drafter.config.target.vocab_size
            candidates = LossVocabulary(vocab.token_ids, vocab_size)
        self.candidates = candidates
        # Whether labels that are no candidates become some.
        self.adds_labels = candidates is not None and vocab is None

    def __call__(
        self,
        objective: Objective,
        texts: Sequence[TextBlocks],
        hidden: torch.Tensor,
        labels: torch.Tensor,
        first: int = 0,
        whole: StepLabels | None = None,
        spans: Spans | None = None,
        block_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of all positions from one on.

        Args:
            objective: What is learnt.
            texts: The blocks' texts.
            hidden: ``[B, k, hidden_size]``, behind the final norm.
            labels: ``[B, k]`` int64 tokens of the texts, or ``IGNORE_LABEL``.
            first: The first position that is taught.
            whole: The labels of the step, where these are a part of them; needed with
                ``spans``.
            spans: Learn, wherever there is a label, what the target says along these
                spans, in place of the text. What is no candidate by the texts' labels
                counts nothing, so that the candidates of a step are known before it.
            block_weights: ``[B]`` float32, what each block counts in the loss; None for
                1. Means are over the number of blocks all the same.

        Returns:
            The loss, and each part's mean over the positions, detached, in which all
            blocks count alike. Those of all parts of a step sum up to what all of its
            blocks together would give.
        """
        wanted = labels[:, first:]
        candidates = self.candidates
        if candidates is not None and self.adds_labels:
            candidates = candidates.with_labels(whole.tokens if whole else wanted)
        previous = labels
        if spans is not None:
            previous = spans.tokens
            said = spans.said[:, first:]
            wanted = said.masked_fill(wanted == IGNORE_LABEL, IGNORE_LABEL)
        columns = wanted if candidates is None else candidates.columns(wanted)
        valid = columns != IGNORE_LABEL
        counts = whole.counts if whole else valid.sum(0)
        if spans is not None:
            assert whole is not None, "spans' labels say nothing about the step"
            counts = whole.positions
        weights = label_weights(columns, objective, counts)
        # Those that are taught anything. With a mean over each position's labels, a
        # block's sum over its positions would be none any more.
        blocks = whole.positions[0] if whole else (wanted[:, 0] != IGNORE_LABEL).sum()
        num_products = wanted.shape[1] * blocks.clamp(min=1)
        of_blocks = (1 / num_products).expand(len(labels), 1)
        if block_weights is not None:
            weights = weights * block_weights[:, None]
            of_blocks = of_blocks * block_weights[:, None]
        own = self._bound.drafter.lm_heads
        # May have to gather its rows, so only where it is used.
        target_head = cache(lambda: self._head(candidates))
        scored = candidates.token_ids if self.adds_labels and candidates else None
        sums: dict[str, torch.Tensor] = {}

        def loss_of(rows: torch.Tensor, part: _Slice) -> torch.Tensor:
            logits = target_head()(rows) if own is None else own(rows, first, scored)
            if self._bound.drafter.markov is not None:
                logits = logits + self._markov(
                    rows, previous[part.of_all], first, candidates
                )
            teacher = None
            if objective.needs_teacher:
                known = _known_positions(part, labels.shape[1], first)
                if spans is not None:
                    known = _span_positions(spans.hidden[part.of_all, first:])
                teacher = self._teacher(known, target_head(), objective)
            losses = position_losses(logits, columns[part.of_all], objective, teacher)
            for name, values in losses.items():
                values = values.detach().masked_fill(~valid[part.of_all], 0.0)
                sums[name] = sums.get(name, 0.0) + values.sum()
            return weighted_sum(
                losses, weights[part.of_all], objective, of_blocks[part.of_all]
            )

        heads = [m for m in (self._bound.drafter.markov, own) if m is not None]
        loss = _summed(
            loss_of,
            _slices(texts, hidden, self._num_candidates(candidates), own),
            # torch multiplies rows of several blocks as one matrix only where nothing
            # is left out between them; else a bfloat16 head takes 80 times as long.
            hidden[:, first:].contiguous(),
            [weight for module in heads for weight in module.parameters()],
        )
        sizes = {"acceptance": num_products}
        count = counts.sum().clamp(min=1)
        return loss, {n: total / sizes.get(n, count) for n, total in sums.items()}

    def _num_candidates(self, candidates: LossVocabulary | None) -> int:
        if candidates is None:
            return self._bound.drafter.config.target.vocab_size
        return len(candidates.token_ids)

    def _head(self, candidates: LossVocabulary | None) -> Head:
        if self._bound.small_head is not None:
            return self._bound.small_head
        if candidates is None:
            return self._bound.target.logits
        return self._bound.target.logits_of_tokens(candidates.token_ids)

    def _markov(
        self,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        first: int,
        candidates: LossVocabulary | None,
    ) -> torch.Tensor:
        """The correction, given the TRUE token before each position, or in a span the
        drafted one: ``tokens`` ``[B, k]``.

        A position whose true predecessor is unknown is never a label either.
        """
        markov = self._bound.drafter.markov
        assert markov is not None
        # The position at the start of the block has no correction when serving.
        start = max(first, 1)
        previous = tokens[:, start - 1 : -1].clamp(min=0)
        whole = candidates is None or not self.adds_labels
        bias = markov(
            previous,
            hidden[:, start - first :],
            None if whole else candidates.token_ids,  # type: ignore[union-attr]
        )
        return nn.functional.pad(bias, (0, 0, start - first, 0))

    @torch.no_grad()
    def _teacher(self, known: _TargetRows, head: Head, objective: Objective) -> Teacher:
        """The target's distribution at each position."""
        hidden, where = known
        if objective.teacher_tokens:
            scores = head(hidden)
            scores, best = scores.topk(
                min(objective.teacher_tokens, scores.shape[-1]), dim=-1
            )
            return Teacher(best[where], scores.float().softmax(-1)[where])
        vocab = self._bound.drafter.draft_vocab
        if vocab is None:
            return Teacher(None, head(hidden).float().softmax(-1)[where])
        # What the drafter cannot say is lost, and counts.
        whole = self._bound.target.logits(hidden).float().softmax(-1)
        return Teacher(None, whole[:, vocab.token_ids][where])


def _known_positions(part: _Slice, num_draft_tokens: int, first: int) -> _TargetRows:
    """Those of each text once, however many blocks cover it."""
    rows: list[torch.Tensor] = []
    where: list[torch.Tensor] = []
    for text, blocks in part.texts:
        hidden = text.states.hidden
        positions = block_positions(text.prefix_lens[blocks], num_draft_tokens)
        # Beyond the text there is no label.
        positions = positions[:, first:].clamp(max=len(hidden) - 1)
        distinct, found = positions.unique(return_inverse=True)
        where.append(found + sum(map(len, rows)))
        rows.append(hidden[distinct])
    return _TargetRows(torch.cat(rows), torch.cat(where))


def _span_positions(hidden: torch.Tensor) -> _TargetRows:
    """Those of spans ``[B, k, hidden_size]``."""
    rows = hidden.flatten(0, 1)
    where = torch.arange(len(rows), device=rows.device)
    return _TargetRows(rows, where.unflatten(0, hidden.shape[:2]))


def blocks_at_once(
    num_scored: int, num_draft_tokens: int, device: torch.device, least: int = 0
) -> int:
    """How many blocks of k positions have logits of a bounded size.

    Args:
        num_scored: Tokens that have a logit.
        num_draft_tokens: k.
        device: Where they are.
        least: Logits that a CPU's slice should have, where there is room.
    """
    most = GPU_LOGITS
    if is_cpu(device):
        most = max(_CPU_LOGITS, min(least, GPU_LOGITS))
    return max(most // (num_scored * num_draft_tokens), 1)


def _slices(
    texts: Sequence[TextBlocks],
    hidden: torch.Tensor,
    num_candidates: int,
    heads: nn.Module | None,
) -> list[_Slice]:
    """All blocks, in slices whose logits have a bounded size: of one text each, but
    where heads are trained.

    Each slice makes a gradient of all weights of the heads, so slices of a CPU are no
    smaller than these.
    """
    weights = 0 if heads is None else sum(w.numel() for w in heads.parameters())
    k, device = hidden.shape[1], hidden.device
    size = blocks_at_once(num_candidates, k, device, weights)
    slices, before = [], 0
    for group in [[text] for text in texts] if heads is None else [texts]:
        num_blocks = sum(len(text.prefix_lens) for text in group)
        for start in range(0, num_blocks, size):
            end = min(start + size, num_blocks)
            of_all = slice(before + start, before + end)
            slices.append(_Slice(_part_of(group, start, end), of_all))
        before += num_blocks
    return slices


def _part_of(
    texts: Sequence[TextBlocks], start: int, end: int
) -> list[tuple[TextBlocks, slice]]:
    """The texts of some of all blocks, and which of each text's they are."""
    found, before = [], 0
    for text in texts:
        num_blocks = len(text.prefix_lens)
        first, last = max(start - before, 0), min(end - before, num_blocks)
        if first < last:
            found.append((text, slice(first, last)))
        before += num_blocks
    return found


LossOfSlice = Callable[[torch.Tensor, _Slice], torch.Tensor]


def _summed(
    loss_of: LossOfSlice,
    slices: Sequence[_Slice],
    rows: torch.Tensor,
    weights: Sequence[nn.Parameter],
) -> torch.Tensor:
    """Sum of a loss over slices of ``rows``, which also depends on ``weights``."""
    if not torch.is_grad_enabled():
        return torch.stack([loss_of(rows[s.of_all], s) for s in slices]).sum()
    return _SummedWithGradient.apply(loss_of, slices, rows, *weights)


class _SummedWithGradient(torch.autograd.Function):
    """Takes the gradient of each slice along with its loss, so that what the slice
    needed for it is gone before the next one."""

    @staticmethod
    def forward(
        ctx: Any,
        loss_of: LossOfSlice,
        slices: Sequence[_Slice],
        rows: torch.Tensor,
        *weights: nn.Parameter,
    ) -> torch.Tensor:
        total = torch.zeros((), device=rows.device)
        of_rows = torch.zeros_like(rows)
        trained = [weight for weight in weights if weight.requires_grad]
        of_weights: dict[nn.Parameter, torch.Tensor] = {}
        for part in slices:
            own = rows[part.of_all].detach().requires_grad_()
            with torch.enable_grad():
                loss = loss_of(own, part)
            found = torch.autograd.grad(loss, [own, *trained], allow_unused=True)
            total += loss.detach()
            of_rows[part.of_all] = found[0]
            for weight, change in zip(trained, found[1:], strict=True):
                if change is not None:
                    before = of_weights.get(weight)
                    of_weights[weight] = change if before is None else before + change
        unused = [weight for weight in trained if weight not in of_weights]
        of_weights |= {weight: torch.zeros_like(weight) for weight in unused}
        ctx.save_for_backward(of_rows, *(of_weights.get(w) for w in weights))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
        found = (g if g is None else g * upstream for g in ctx.saved_tensors)
        return None, None, *found
