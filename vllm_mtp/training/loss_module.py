# SPDX-License-Identifier: Apache-2.0
"""The module that Trainer trains: from texts to a loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_mtp.drafter.layout import (
    block_positions,
    possible_anchors,
    span_ends,
)
from vllm_mtp.drafter.model import BoundDrafter, Drafter
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.texts import TextBlocks, anchors_are_exact, forward_texts
from vllm_mtp.training.anchors import choose_anchors, generator_for
from vllm_mtp.training.features import FeatureLoss
from vllm_mtp.training.loss_vocabulary import LossVocabulary
from vllm_mtp.training.objective import Objective, Teacher, objective_loss
from vllm_mtp.training.states import StatesSource


@dataclass(frozen=True)
class LossPlan:
    """How texts become lessons.

    Attributes:
        objective: The losses.
        anchors_per_text: Most blocks behind one text in one step.
        feature_weight: Weight of the feature loss; 0 for none.
        states_budget: Bytes for keeping the target's states.
        seed: Seed of the anchors.
        num_draft_tokens: Teach only the first so many positions; None for all.
    """

    objective: Objective = Objective()
    anchors_per_text: int = 64
    feature_weight: float = 0.0
    states_budget: float = 0.0
    seed: int = 0
    num_draft_tokens: int | None = None


class LossModule(nn.Module):
    """A drafter with all that is needed to teach it.

    Only the drafter's weights are its parameters. The target is no submodule: it is
    neither trained, nor saved, nor copied to other processes.

    Args:
        drafter: Trained in place.
        host: Its frozen target.
        plan: How to teach.
        candidates: Tokens that are scored; None for the whole output vocabulary. A
            drafter with a reduced vocabulary scores that.
    """

    def __init__(
        self,
        drafter: Drafter,
        host: HFTarget,
        plan: LossPlan,
        candidates: LossVocabulary | None = None,
    ) -> None:
        super().__init__()
        self.drafter = drafter
        self.plan = plan
        self.bound = BoundDrafter(drafter, host)
        self.host = host
        self.features = FeatureLoss(self.bound) if plan.feature_weight else None
        self.states = StatesSource(
            host,
            drafter.config.bound_layers,
            self.features.streams if self.features else (),
            plan.states_budget,
        )
        vocab = drafter.draft_vocab
        self.candidates = (
            LossVocabulary(vocab.token_ids, drafter.config.target.vocab_size)
            if vocab is not None
            else candidates
        )

    def forward(
        self, texts: Sequence[Mapping[str, Any]], step: int
    ) -> dict[str, torch.Tensor]:
        """One lesson.

        Args:
            texts: Rows of a data set with ``index`` (its number), ``input_ids``
                (``[T]`` int64 tensor) and ``loss_spans``.
            step: The optimizer's step; it decides where the blocks stand.

        Returns:
            ``loss``, and its parts for the log.
        """
        blocks = [self.blocks(text, step) for text in texts]
        return self.loss_of(blocks)

    def blocks(self, text: Mapping[str, Any], step: int) -> TextBlocks:
        """The blocks behind one text in one step."""
        anchors = choose_anchors(
            possible_anchors(text["loss_spans"], len(text["input_ids"])),
            self.plan.anchors_per_text,
            generator_for(self.plan.seed, step, text["index"]),
        )
        return self.blocks_at(text, anchors)

    def blocks_at(self, text: Mapping[str, Any], anchors: torch.Tensor) -> TextBlocks:
        """Blocks at given anchors ``[A]`` of a text, whose labels end with their
        span."""
        token_ids = text["input_ids"]
        ends = span_ends(anchors, text["loss_spans"], len(token_ids))
        states = self.states.get(text["index"], token_ids)
        device = token_ids.device
        return TextBlocks(token_ids, states, anchors.to(device), ends.to(device))

    def loss_of(self, texts: Sequence[TextBlocks]) -> dict[str, torch.Tensor]:
        """The loss of given blocks; as `forward`."""
        num_draft_tokens = self.num_draft_tokens
        hidden = forward_texts(self.bound, texts, num_draft_tokens)
        labels = torch.cat([text.labels(num_draft_tokens) for text in texts])
        # Where the first position is the target's own, there is nothing to teach.
        first = int(self.first_position_is_exact)
        loss, parts = self._objective(texts, hidden[:, first:], labels, first)
        if self.features is not None:
            parts["feature"] = self.features.pop(texts, hidden, labels)
            loss = loss + self.plan.feature_weight * parts["feature"]
        parts = {name: value.detach() for name, value in parts.items()}
        return {"loss": loss, **parts}

    @property
    def num_draft_tokens(self) -> int:
        """Places that are taught."""
        return self.plan.num_draft_tokens or self.drafter.config.num_speculative_tokens

    @property
    def first_position_is_exact(self) -> bool:
        exact = anchors_are_exact(self.drafter.config)
        return exact and self.num_draft_tokens > 1

    def _objective(
        self,
        texts: Sequence[TextBlocks],
        hidden: torch.Tensor,
        labels: torch.Tensor,
        first: int,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        wanted = labels[:, first:]
        candidates = self.candidates
        if candidates is not None and self.drafter.draft_vocab is None:
            candidates = candidates.with_labels(wanted)
        head = self._head(candidates)
        logits = head(hidden)
        if self.drafter.markov is not None:
            logits = logits + self._markov(hidden, labels, first, candidates)
        columns = candidates.columns(wanted) if candidates else wanted
        teacher = None
        if self.plan.objective.needs_teacher:
            teacher = self._teacher(texts, head, labels.shape[1], first)
        return objective_loss(logits, columns, self.plan.objective, teacher)

    def _head(
        self, candidates: LossVocabulary | None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        if candidates is None:
            return self.host.logits
        if self.bound.small_head is not None:
            return self.bound.small_head
        return self.host.logits_of_tokens(candidates.token_ids)

    def _markov(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        first: int,
        candidates: LossVocabulary | None,
    ) -> torch.Tensor:
        """The correction, given the TRUE token before each position.

        A position whose true predecessor is unknown is never a label either.
        """
        assert self.drafter.markov is not None
        # The position at the start of the block has no correction when serving.
        start = max(first, 1)
        previous = labels[:, start - 1 : -1].clamp(min=0)
        whole = candidates is None or self.drafter.draft_vocab is not None
        bias = self.drafter.markov(
            previous,
            hidden[:, start - first :],
            None if whole else candidates.token_ids,  # type: ignore[union-attr]
        )
        return nn.functional.pad(bias, (0, 0, start - first, 0))

    @torch.no_grad()
    def _teacher(
        self,
        texts: Sequence[TextBlocks],
        head: Callable[[torch.Tensor], torch.Tensor],
        num_draft_tokens: int,
        first: int,
    ) -> Teacher:
        """The target's likeliest tokens at each position. Each position of a text is
        scored once, however many blocks cover it."""
        columns, probs = [], []
        for text in texts:
            hidden = text.states.hidden
            positions = block_positions(text.prefix_lens, num_draft_tokens)[:, first:]
            positions = positions.clamp(
                max=hidden.shape[0] - 1
            )  # beyond: no label there
            distinct, where = positions.unique(return_inverse=True)
            scores = head(hidden[distinct])
            count = min(self.plan.objective.teacher_tokens, scores.shape[-1])
            scores, best = scores.topk(count)
            columns.append(best[where])
            probs.append(scores.float().softmax(-1)[where])
        return Teacher(torch.cat(columns), torch.cat(probs))
