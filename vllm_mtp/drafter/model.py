# SPDX-License-Identifier: Apache-2.0
"""The drafter: placeholders, a list of bound layers, and the heads around them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum

import torch
from torch import nn
from torch.profiler import record_function

from vllm_mtp.drafter.config import DrafterConfig, SharedLayerConfig, require_window
from vllm_mtp.drafter.heads import DraftVocab, MarkovCorrection, Pick, pick_block
from vllm_mtp.drafter.host import TargetHost
from vllm_mtp.drafter.layers import OwnLayer, SharedLayer, Stream
from vllm_mtp.drafter.layout import is_placeholder
from vllm_mtp.drafter.scopes import CHOICE, HEAD, LAYERS


class Traced(IntEnum):
    """What a trace sees besides the layers; these are numbered from 0."""

    FINAL_NORM = -1  # [B * k, hidden_size]
    INPUT = -2  # [B * k, hidden_size]
    POSITIONS = -3  # [B, k]
    ANCHORS = -4  # [B]
    DRAFTS = -5  # [B, k]


Trace = Callable[[int, torch.Tensor], None]
"""Called with a layer's index and the stream behind it, ``[B * k, hidden_size]``, and
with each of `Traced`; positions first, drafts last."""


RunLayers = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor
]
"""From the embedded rows ``[rows, hidden_size]``, their positions ``[rows]`` int64, the
boundary hidden state of each row's block ``[rows, hidden_size]`` or None, and LoRA's
gate ``[rows, 1]``, to the last hidden states ``[rows, hidden_size]``."""


def scope(name: str) -> AbstractContextManager[object]:
    """Shows a stage to torch's profiler; next to nothing while none runs.

    A bare `record_function` would take 10 microseconds each time, on a GPU's host
    too.
    """
    running = torch.autograd.profiler._is_profiler_enabled
    return record_function(name) if running else nullcontext()


def _call(layer: Callable[..., Stream], *inputs: object) -> Stream:
    return layer(*inputs)


class Drafter(nn.Module):
    """Every trained weight of a drafter, and nothing of the target's.

    Its ``state_dict`` is the checkpoint's list of tensors.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        facts = config.target
        num_placeholders = config.num_speculative_tokens - 1
        self.placeholders = (
            nn.Parameter(
                torch.empty(num_placeholders, facts.hidden_size),
                # The target's own embeddings are not trained.
                requires_grad=config.noise is None,
            )
            if num_placeholders
            else None
        )
        self.layers = nn.ModuleList(
            SharedLayer(layer, facts)
            if isinstance(layer, SharedLayerConfig)
            else OwnLayer(layer, facts)
            for layer in config.layers
        )
        size = config.draft_vocab_size
        self.draft_vocab = DraftVocab(size) if size else None
        self.markov = (
            MarkovCorrection(
                config.markov.rank,
                facts.hidden_size,
                facts.vocab_size,
                size or facts.vocab_size,
            )
            if config.markov
            else None
        )

    def init_weights(self, generator: torch.Generator) -> None:
        """Start values of all that is not copied from the target."""
        for module in (*self.layers, self.markov):
            if module is not None:
                module.init_weights(generator)  # type: ignore[operator]


class BoundDrafter:
    """A drafter on its target, ready to draft.

    Args:
        drafter: The weights.
        target: The host; it also says which prefix each row reads.

    Raises:
        TargetMismatchError: The drafter's window is shorter than a layer's own.

    Attributes:
        trace: Set it to see what every stage of a forward computes.
        layers_runner: Runs the layers; a host may put a compiled one in its place.
        layer_call: Calls one layer with its arguments; training may put one in its
            place that keeps less for the backward.
    """

    def __init__(self, drafter: Drafter, target: TargetHost) -> None:
        require_window(drafter.config, target.sliding_window)
        self.trace: Trace | None = None
        self.drafter = drafter
        self.target = target
        self.layers_runner: RunLayers = self._run_layers
        self.layer_call: Callable[..., Stream] = _call
        self._shared = {
            index: layer.bind(target)
            for index, layer in enumerate(drafter.layers)
            if isinstance(layer, SharedLayer)
        }
        vocab = drafter.draft_vocab
        self.small_head = target.logits_of_tokens(vocab.token_ids) if vocab else None

    @property
    def weights(self) -> list[nn.Module]:
        """All that a draft reads and the target does not have."""
        return [self.drafter, *([self.small_head] if self.small_head else [])]

    def forward(
        self,
        anchor_ids: torch.Tensor | None,
        positions: torch.Tensor,
        boundary: torch.Tensor | None = None,
        placeholder_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One parallel forward of all blocks.

        Args:
            anchor_ids: ``[B]`` integer; the token just sampled. None for blocks of
                placeholders alone, whose anchor is part of the prefix.
            positions: ``[B, k]`` int64; k at most what the drafter was made for.
            boundary: ``[B, hidden_size]``; the target's last hidden state (after
                its final norm) at the last prefix position. Needed only when
                ``config.uses_boundary_hidden``.
            placeholder_ids: ``[B, placeholders]`` int64; tokens whose embeddings stand
                in place of the drafter's own placeholders. Training draws them anew
                for each block.

        Returns:
            Last hidden states ``[B, k, hidden_size]``, after the final norm.
        """
        with scope(LAYERS):
            num_draft_tokens = positions.shape[1]
            rows = positions.reshape(-1)
            embedded = self._embed(anchor_ids, placeholder_ids, *positions.shape)
            # LoRA acts on placeholders.
            if anchor_ids is None:
                gate = torch.ones_like(embedded[:, :1])
            else:
                gate = is_placeholder(len(rows), num_draft_tokens, rows.device)
                gate = gate[:, None].to(embedded.dtype)
            if boundary is not None:
                boundary = boundary.repeat_interleave(num_draft_tokens, dim=0)
            run = self.layers_runner
            if self.trace is not None:
                self.trace(Traced.POSITIONS, positions)
                if anchor_ids is not None:
                    self.trace(Traced.ANCHORS, anchor_ids)
                self.trace(Traced.INPUT, embedded)
                run = self._run_layers  # it is called from between the layers
            hidden = run(embedded, rows, boundary, gate)
            return hidden.unflatten(0, (-1, num_draft_tokens))

    def _run_layers(
        self,
        embedded: torch.Tensor,
        positions: torch.Tensor,
        boundary: torch.Tensor | None,
        gate: torch.Tensor,
    ) -> torch.Tensor:
        """See `RunLayers`."""
        stream, call = Stream(embedded), self.layer_call
        for index, layer in enumerate(self.drafter.layers):
            if isinstance(layer, OwnLayer):
                stream = call(layer, self.target, stream, positions, boundary)
            else:
                shared = self._shared[index]
                stream = call(layer, self.target, shared, stream, positions, gate)
            if self.trace is not None:
                self.trace(index, stream.summed())
        hidden = self.target.final_norm(stream)
        if self.trace is not None:
            self.trace(Traced.FINAL_NORM, hidden)
        return hidden

    def _embed(
        self,
        anchor_ids: torch.Tensor | None,
        placeholder_ids: torch.Tensor | None,
        num_blocks: int,
        num_draft_tokens: int,
    ) -> torch.Tensor:
        anchors = None if anchor_ids is None else self.target.embed(anchor_ids)
        num_placeholders = num_draft_tokens - (anchors is not None)
        if num_placeholders == 0:
            assert anchors is not None, "a block has at least one row"
            return anchors
        if placeholder_ids is not None:
            ids = placeholder_ids[:, :num_placeholders]
            block = self.target.embed(ids.flatten()).unflatten(0, ids.shape)
        else:
            assert self.drafter.placeholders is not None, "k is at most the trained one"
            block = self.drafter.placeholders[:num_placeholders]
            block = block.expand(num_blocks, -1, -1)
        if anchors is not None:
            # In the target's type, also where the trained weights are wider.
            block = torch.cat([anchors[:, None], block.to(anchors.dtype)], dim=1)
        return block.flatten(0, 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Uncorrected logits over the output vocabulary.

        Args:
            hidden: ``[B, k, hidden_size]``.

        Returns:
            ``[B, k, V]``.
        """
        head = self.target.logits if self.small_head is None else self.small_head
        return head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

    def draft(
        self, hidden: torch.Tensor, pick: Pick, *, whole_vocab: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Choose the block's tokens.

        Args:
            hidden: ``[B, k, hidden_size]`` from `forward`.
            pick: The sampler.
            whole_vocab: Show ``pick`` logits over the target's whole vocabulary,
                also when the drafter's is reduced (probabilistic drafts need it).

        Returns:
            Token ids ``[B, k]`` int64 of the target's vocabulary, and the
            distributions ``[B, k, V]`` where ``pick`` keeps them.
        """
        with scope(HEAD):
            logits = self.logits(hidden)
        with scope(CHOICE):
            tokens, distributions = pick_block(
                logits,
                hidden,
                self.drafter.markov,
                self.drafter.draft_vocab,
                pick,
                spread_to=self.drafter.config.target.vocab_size
                if whole_vocab
                else None,
            )
        if self.trace is not None:
            self.trace(Traced.DRAFTS, tokens)
        return tokens, distributions
