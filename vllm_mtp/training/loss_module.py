# SPDX-License-Identifier: Apache-2.0
"""The module that Trainer trains: from texts to a loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.layout import possible_anchors, span_ends
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.drafter.noise import draw_noise
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.texts import (
    TextBlocks,
    anchors_are_exact,
    forward_texts,
    labels_behind,
    streams_of,
)
from vllm_mtp.training.anchors import choose_anchors, choose_window, generator_for
from vllm_mtp.training.features import FeatureLoss
from vllm_mtp.training.loss_vocabulary import LossVocabulary
from vllm_mtp.training.objective import Objective
from vllm_mtp.training.on_policy import Verifier, on_tokens
from vllm_mtp.training.schedule import Schedule
from vllm_mtp.training.states import StatesSource
from vllm_mtp.training.step_labels import StepLabels, step_labels
from vllm_mtp.training.token_loss import Spans, TokenLoss
from vllm_mtp.training.walk import draft_greedily, visited

# Parts for the log that are no losses: which part of the blocks decoding would run.
MEASURES = frozenset(("visited",))


@dataclass(frozen=True)
class LossPlan:
    """What a step learns from texts.

    Attributes:
        objective: The losses.
        anchors_per_text: Most blocks behind one text in one step.
        feature_weight: Weight of the feature loss; 0 for none.
        states_budget: Bytes for keeping the target's states.
        states_folder: Where they are kept from run to run; None for nowhere.
        seed: Seed of the anchors.
        num_draft_tokens: Only the first so many positions are learnt; None for all.
        schedule: What is learnt otherwise in a run's first steps.
        on_policy_weight: Which part of the objective's loss is of spans that the
            drafter drafts itself, 0 to 1; the rest is of the text.
        unvisited_weight: What the objective's loss of a block counts where greedy
            decoding with the drafter as it is would not draft (`walk`); 1 where it
            would. Below 1 the blocks of a text stand behind anchors that follow each
            other.
    """

    objective: Objective = Objective()
    anchors_per_text: int = 64
    feature_weight: float = 0.0
    states_budget: float = 0.0
    states_folder: Path | None = None
    seed: int = 0
    num_draft_tokens: int | None = None
    schedule: Schedule = Schedule()
    on_policy_weight: float = 0.0
    unvisited_weight: float = 1.0


class LossModule(nn.Module):
    """A drafter with all that is needed to train it.

    Only the drafter's weights are its parameters. The target is no submodule: it is
    neither trained, nor saved, nor copied to other processes.

    Args:
        drafter: Trained in place.
        host: Its frozen target.
        plan: What is learnt.
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
        self.verifier = Verifier(self.bound) if plan.on_policy_weight else None
        self.states = StatesSource(
            host,
            self.cached_layers,
            self.streams,
            plan.states_budget,
            plan.states_folder,
        )
        self.token_loss = TokenLoss(self.bound, candidates)

    @property
    def cached_layers(self) -> tuple[int, ...]:
        """Target layers whose keys and values are read."""
        reader = self.drafter.config if self.verifier is None else self.verifier
        return reader.read_layers

    @property
    def streams(self) -> frozenset[int]:
        """Target layers whose output is read."""
        compared = self.features.streams if self.features else frozenset()
        return compared.union(streams_of(self.drafter.config))

    def forward(
        self,
        texts: Sequence[Mapping[str, Any]],
        step: int,
        whole: StepLabels | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss of some texts.

        Args:
            texts: Rows of a data set with ``index`` (its number), ``input_ids``
                (``[T]`` int64 tensor) and ``loss_spans``.
            step: The optimizer's step; it decides where the blocks stand, and what is
                learnt by `LossPlan.schedule`.
            whole: From `labels_of_step`, where these texts are a part of the step's.

        Returns:
            ``loss``, and its parts for the log. Those of all parts of a step sum up to
            what all of its texts at once would give.
        """
        blocks = [self.blocks(text, step) for text in texts]
        return self.loss_of(blocks, whole, step)

    def labels_of_step(
        self,
        texts: Sequence[Mapping[str, Any]],
        step: int,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
    ) -> StepLabels:
        """What every part of a step has to know, found without running the target.

        Args:
            texts: All of this process in the step, or none; as in `forward`.
            step: The step.
            sum_over_processes: Takes and gives an int64 tensor ``[n]``.
        """
        shape = 0, self._positions(step)
        none = torch.empty(shape, dtype=torch.int64, device=self.host.device)
        labels = torch.cat([none, *(self._labels(text, step) for text in texts)])
        return self._step_labels(labels, sum_over_processes)

    def _step_labels(
        self,
        labels: torch.Tensor,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
    ) -> StepLabels:
        return step_labels(
            labels,
            int(self.first_position_is_exact),
            self.token_loss.candidates,
            self.token_loss.adds_labels,
            self.drafter.config.target.vocab_size,
            sum_over_processes,
        )

    def _labels(self, text: Mapping[str, Any], step: int) -> torch.Tensor:
        token_ids, anchors = text["input_ids"], self._anchors(text, step)
        ends = span_ends(anchors, text["loss_spans"], len(token_ids))
        anchors, ends = anchors.to(token_ids.device), ends.to(token_ids.device)
        return labels_behind(token_ids, anchors, ends, self._positions(step))

    def blocks(self, text: Mapping[str, Any], step: int) -> TextBlocks:
        """The blocks behind one text in one step."""
        anchors = self._anchors(text, step)
        blocks = self.blocks_at(text, anchors)
        return blocks._replace(noise_ids=self._noise(text, step, len(anchors)))

    def _anchors(self, text: Mapping[str, Any], step: int) -> torch.Tensor:
        choose = choose_anchors if self.plan.unvisited_weight == 1 else choose_window
        return choose(
            possible_anchors(text["loss_spans"], len(text["input_ids"])),
            self.plan.anchors_per_text,
            generator_for(self.plan.seed, step, text["index"]),
        )

    def _noise(
        self, text: Mapping[str, Any], step: int, num_blocks: int
    ) -> torch.Tensor | None:
        """Noise tokens ``[B, placeholders]`` of a text's blocks in one step."""
        noise = self.drafter.config.noise
        if noise is None:
            return None
        # Another generator than that of the anchors, so these stay where they are.
        generator = generator_for(self.plan.seed, step, text["index"], 1)
        shape = num_blocks, self._positions(step) - 1
        ids = draw_noise(noise.low, noise.high, shape, generator)
        return ids.to(text["input_ids"].device)

    def blocks_at(self, text: Mapping[str, Any], anchors: torch.Tensor) -> TextBlocks:
        """Blocks at given anchors ``[A]`` of a text, whose labels end with their
        span."""
        token_ids = text["input_ids"]
        ends = span_ends(anchors, text["loss_spans"], len(token_ids))
        states = self.states.get(text["index"], token_ids)
        device = token_ids.device
        return TextBlocks(token_ids, states, anchors.to(device), ends.to(device))

    def loss_of(
        self,
        texts: Sequence[TextBlocks],
        whole: StepLabels | None = None,
        step: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss of given blocks; as `forward`. Without a step it is the one that a
        run ends with."""
        num_draft_tokens, objective = self._positions(step), self.plan.objective
        if step is not None:
            objective = self.plan.schedule.objective(objective, step)
        own_part = self.plan.on_policy_weight
        # Of a chain that learns from its own spans alone, nobody reads the text's rows.
        is_read = own_part < 1 or self.features or self.drafter.config.chain is None
        hidden = forward_texts(self.bound, texts, num_draft_tokens) if is_read else None
        labels = torch.cat([text.labels(num_draft_tokens) for text in texts])
        # Where the first position is the target's own, there is nothing to learn.
        first = int(self.first_position_is_exact)
        loss = torch.zeros((), device=labels.device)
        parts: dict[str, torch.Tensor] = {}
        weights = None
        drafted = cache(
            lambda: draft_greedily(self.bound, texts, hidden, num_draft_tokens)
        )
        if self.plan.unvisited_weight < 1:
            seen = visited(texts, drafted(), labels)
            weights = torch.where(seen, 1.0, self.plan.unvisited_weight)
            parts["visited"] = seen.sum() / (whole.blocks if whole else len(labels))
        if own_part < 1 and hidden is not None:
            of_text, found = self.token_loss(
                objective, texts, hidden, labels, first, whole, None, weights
            )
            parts |= found
            loss = (1 - own_part) * of_text
        if self.features is not None and hidden is not None:
            parts["feature"] = self.features.pop(
                texts, hidden, labels, whole.total if whole else None
            )
            loss = loss + self.plan.feature_weight * parts["feature"]
        if self.verifier is not None:
            spans = self.verifier.spans(texts, drafted())
            of_spans, found = self._of_spans(
                spans, objective, texts, hidden, labels, whole, weights
            )
            loss = loss + own_part * of_spans
            parts |= {f"on_policy_{name}": value for name, value in found.items()}
        parts = {name: value.detach() for name, value in parts.items()}
        return {"loss": loss, **parts}

    def _of_spans(
        self,
        spans: Spans,
        objective: Objective,
        texts: Sequence[TextBlocks],
        hidden: torch.Tensor | None,
        labels: torch.Tensor,
        whole: StepLabels | None,
        weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of what the drafter drafts behind the same anchors."""
        whole = whole or self._step_labels(labels, lambda counts: counts)
        first, k = int(self.first_position_is_exact), labels.shape[1]
        if hidden is None or self.drafter.config.chain is not None:
            # Its rows read what it drafts, so they are others than behind the text.
            hidden = forward_texts(self.bound, on_tokens(texts, spans.tokens), k)
        return self.token_loss(
            objective, texts, hidden, labels, first, whole, spans, weights
        )

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Keep the layers' inputs alone, and compute the rest anew in the backward, as
        transformers' models do under the same name."""
        self.bound.layer_call = self.host.recomputed

    @property
    def num_draft_tokens(self) -> int:
        """Positions that are learnt in the end."""
        return self.plan.num_draft_tokens or self.drafter.config.num_speculative_tokens

    def _positions(self, step: int | None) -> int:
        """Positions that are learnt in a step, or in the end."""
        most = self.num_draft_tokens
        return most if step is None else self.plan.schedule.positions(most, step)

    @property
    def first_position_is_exact(self) -> bool:
        exact = anchors_are_exact(self.drafter.config)
        return exact and self.num_draft_tokens > 1
