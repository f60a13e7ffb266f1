# SPDX-License-Identifier: Apache-2.0
"""A drafter on its target: blocks or chains through the layers and the heads."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import IntEnum

import torch
from torch import nn
from torch.profiler import record_function

from vllm_mtp.drafter.boundary import Boundary, BoundaryReader
from vllm_mtp.drafter.config import require_window
from vllm_mtp.drafter.heads import Pick, pick_block
from vllm_mtp.drafter.host import TargetHost
from vllm_mtp.drafter.layers import (
    BlockRows,
    MLPLayer,
    OwnLayer,
    SharedLayer,
    Stream,
)
from vllm_mtp.drafter.layout import is_placeholder
from vllm_mtp.drafter.lora import GatedLinear
from vllm_mtp.drafter.model import Drafter
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
    [torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, BlockRows],
    torch.Tensor,
]
"""From the embedded rows ``[rows, hidden_size]``, their positions ``[rows]`` int64, the
boundary hidden states of each row's block (``[rows, hidden_size]``, ``[rows, readers,
hidden_size]`` or None), the gate of what placeholder rows change ``[rows, 1]``, and how
rows belong to blocks, to the last hidden states ``[rows, hidden_size]``."""

Step = Callable[[int], AbstractContextManager[object]]
"""What the forward that begins at a position of the blocks runs in: attention metadata,
for one. Blocks that run at once have one that begins at 0; of a chain each row has
one."""


def scope(name: str) -> AbstractContextManager[object]:
    """Shows a stage to torch's profiler; next to nothing while none runs.

    A bare `record_function` would take 10 microseconds each time, on a GPU's host
    too.
    """
    running = torch.autograd.profiler._is_profiler_enabled
    return record_function(name) if running else nullcontext()


def _call(layer: Callable[..., Stream], *inputs: object) -> Stream:
    return layer(*inputs)


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
        needs_head = vocab is not None and drafter.lm_heads is None
        self.small_head = (
            target.logits_of_tokens(vocab.token_ids) if vocab and needs_head else None
        )
        self._boundary = BoundaryReader(drafter.config, target)
        self._are_heads = drafter.config.are_heads

    @property
    def weights(self) -> list[nn.Module]:
        """All that a draft reads and the target does not have."""
        return [self.drafter, *([self.small_head] if self.small_head else [])]

    @property
    def changed_linears(self) -> list[GatedLinear]:
        """The target's linear modules with what the drafter changes in them."""
        shadows = (each for layer in self._shared.values() for each in layer.modules())
        return [each for each in shadows if isinstance(each, GatedLinear)]

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
            boundary: Needed only when ``config.uses_boundary_hidden``: the target's
                hidden states at the last prefix position. ``[B, hidden_size]``, the
                last one (after its final norm), or ``[B, sources, hidden_size]`` where
                ``config.boundary_sources`` names others.
            placeholder_ids: ``[B, placeholders]`` int64; tokens whose embeddings stand
                in place of the drafter's own placeholders. Training draws them anew
                for each block.

        Returns:
            Last hidden states ``[B, k, hidden_size]``, after the final norm.
        """
        config = self.drafter.config
        with scope(LAYERS):
            read = self.read_boundary(boundary)
            if config.input == "boundary":
                assert read.last is not None, (
                    "the caller gives what the config asks for"
                )
                block = read.last[:, None].expand(-1, positions.shape[1], -1)
                gate = torch.ones_like(block[..., :1])
            else:
                block, gate = self._block(anchor_ids, placeholder_ids, *positions.shape)
            extra = config.extra_rows
            before = int(anchor_ids is not None)
            if extra:
                # They stand where the anchor does.
                at_anchor = positions[:, :1] - (1 - before)
                where = positions[:, :before], positions[:, before:]
                positions = torch.cat(
                    [where[0], at_anchor.expand(-1, extra), where[1]], dim=1
                )
            rows = BlockRows(block.shape[1], causal=config.block_mask == "causal")
            if self.trace is not None:
                self.trace(Traced.POSITIONS, positions)
                if anchor_ids is not None:
                    self.trace(Traced.ANCHORS, anchor_ids)
            hidden = self._run(
                block.flatten(0, 1), positions.flatten(), read.of_layers, gate, rows
            )
            hidden = rows.by_block(hidden)
            if extra:
                parts = hidden[:, :before], hidden[:, before + extra :]
                hidden = torch.cat(parts, dim=1)
            return hidden

    def _chain_row(
        self,
        position: int,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        read: torch.Tensor | None,
    ) -> torch.Tensor:
        """One row of each chain.

        Args:
            position: Which of the chain, from 0.
            token_ids: ``[B]`` integer; the anchor, or the token drafted before.
            positions: ``[B]`` int64.
            hidden: ``[B, hidden_size]``; the boundary hidden state, or what the row
                before gave.
            read: `Boundary.of_layers`.

        Returns:
            Last hidden states ``[B, hidden_size]``, after the final norm.
        """
        assert self.drafter.chain is not None, "a drafter with a chain"
        with scope(LAYERS):
            embedded = self.target.embed(token_ids)
            entering = self.drafter.chain(embedded, hidden)
            # The anchor's row comes first, and changes act on the others.
            gate = torch.full_like(embedded[:, :1], float(position > 0))
            rows = BlockRows(1, first=position)
            entering = entering.to(embedded.dtype)
            return self._run(entering, positions, read, gate[:, None], rows)

    def known_chain(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        boundary: torch.Tensor,
    ) -> torch.Tensor:
        """Chains on tokens that are known: the anchors, and the true tokens behind.

        Args:
            token_ids: ``[B, k]`` int64.
            positions: ``[B, k]`` int64.
            boundary: As in `forward`.

        Returns:
            ``[B, k, hidden_size]``, as `forward`.
        """
        read, found = self.read_boundary(boundary), []
        hidden = read.last
        assert hidden is not None, "a chain begins with a hidden state"
        for position in range(positions.shape[1]):
            tokens, where = token_ids[:, position], positions[:, position]
            hidden = self._chain_row(position, tokens, where, hidden, read.of_layers)
            found.append(hidden)
        return torch.stack(found, dim=1)

    def read_boundary(self, boundary: torch.Tensor | None) -> Boundary:
        """What is read of hidden states as in `forward`."""
        if boundary is None or boundary.ndim == 2:
            return Boundary(boundary, boundary)  # one, or none
        return self._boundary.read(boundary, self.drafter.boundary_mix)

    def propose(
        self,
        anchor_ids: torch.Tensor,
        positions: torch.Tensor,
        boundary: torch.Tensor | None,
        pick: Pick,
        *,
        step: Step | None = None,
        whole_vocab: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft k tokens behind each anchor.

        Args:
            anchor_ids: ``[B]`` integer.
            positions: ``[B, k]`` int64.
            boundary: As in `forward`.
            pick: As in `draft`.
            step: What each forward runs in.
            whole_vocab: As in `draft`.

        Returns:
            As `draft`.
        """
        step = step or (lambda _: nullcontext())
        if self.drafter.chain is None:
            with step(0):
                hidden = self.forward(anchor_ids, positions, boundary)
                return self.draft(hidden, pick, whole_vocab=whole_vocab)
        read = self.read_boundary(boundary)
        tokens, state = anchor_ids, read.last
        assert state is not None, "a chain begins with a hidden state"
        drafted: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        with self._one_trace(positions, anchor_ids) as trace_drafts:
            for position in range(positions.shape[1]):
                with step(position):
                    # Kernels take rows that lie one after the other.
                    where = positions[:, position].contiguous()
                    state = self._chain_row(
                        position, tokens, where, state, read.of_layers
                    )
                    chosen, distribution = self.draft(
                        state[:, None], pick, whole_vocab=whole_vocab
                    )
                tokens = chosen[:, 0]
                drafted.append(tokens)
                if distribution is not None:
                    kept.append(distribution[:, 0])
        block = torch.stack(drafted, dim=1)
        trace_drafts(block)
        return block, torch.stack(kept, dim=1) if kept else None

    @contextmanager
    def _one_trace(
        self, positions: torch.Tensor, anchor_ids: torch.Tensor
    ) -> Iterator[Callable[[torch.Tensor], None]]:
        """Show a chain's rows to the trace as those of blocks that ran at once.

        Gives what shows the drafts, to be called behind it.
        """
        trace, seen = self.trace, dict[int, list[torch.Tensor]]()
        if trace is None:
            yield lambda _: None
            return
        self.trace = lambda stage, rows: seen.setdefault(stage, []).append(rows)
        try:
            yield lambda drafts: trace(Traced.DRAFTS, drafts)
        finally:
            self.trace = trace
        trace(Traced.POSITIONS, positions)
        trace(Traced.ANCHORS, anchor_ids)
        seen.pop(Traced.DRAFTS, None)
        for stage, rows in seen.items():
            trace(stage, torch.stack(rows, dim=1).flatten(0, 1))

    def boundary_of_layer(
        self, layer: OwnLayer, of_layers: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What one layer reads of `Boundary.of_layers`. ``[rows, hidden_size]``."""
        if of_layers is None or of_layers.ndim == 2:
            return of_layers
        return self._boundary.of_layer(layer.config, of_layers)

    def _run(
        self,
        embedded: torch.Tensor,
        positions: torch.Tensor,
        boundary: torch.Tensor | None,
        gate: torch.Tensor,
        rows: BlockRows,
    ) -> torch.Tensor:
        """The layers on rows ``[B * n, ..]`` of blocks whose boundary hidden states and
        gates are ``[B, ..]`` and ``[B, n, 1]``."""
        if boundary is not None:
            boundary = boundary.repeat_interleave(rows.num_positions, dim=0)
        run = self.layers_runner
        if self.trace is not None:
            self.trace(Traced.INPUT, embedded)
            run = self._run_layers  # it is called from between the layers
        return run(embedded, positions, boundary, gate.flatten(0, 1), rows)

    def _run_layers(
        self,
        embedded: torch.Tensor,
        positions: torch.Tensor,
        boundary: torch.Tensor | None,
        gate: torch.Tensor,
        rows: BlockRows,
    ) -> torch.Tensor:
        """See `RunLayers`."""
        stream, call = Stream(embedded), self.layer_call
        for index, layer in enumerate(self.drafter.layers):
            if isinstance(layer, OwnLayer):
                read = self.boundary_of_layer(layer, boundary)
                stream = call(layer, self.target, stream, positions, read, rows)
            elif isinstance(layer, MLPLayer):
                stream = call(layer, self.target, stream, rows)
            else:
                shared = self._shared[index]
                stream = call(layer, self.target, shared, stream, positions, gate)
            if self.trace is not None:
                self.trace(index, stream.summed())
        # What enters heads has passed the norm.
        norm = Stream.summed if self._are_heads else self.target.final_norm
        hidden = norm(stream)
        if self.trace is not None:
            self.trace(Traced.FINAL_NORM, hidden)
        return hidden

    def _block(
        self,
        anchor_ids: torch.Tensor | None,
        placeholder_ids: torch.Tensor | None,
        num_blocks: int,
        num_draft_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each block's rows ``[B, rows, hidden_size]``, and which of them are not the
        anchor's ``[B, rows, 1]``, 0 or 1."""
        anchors = None if anchor_ids is None else self.target.embed(anchor_ids)
        num_placeholders = num_draft_tokens - (anchors is not None)
        parts: list[torch.Tensor] = []
        if self.drafter.extra_rows is not None:
            parts.append(self.drafter.extra_rows.expand(num_blocks, -1, -1))
        if num_placeholders and placeholder_ids is not None:
            ids = placeholder_ids[:, :num_placeholders]
            parts.append(self.target.embed(ids.flatten()).unflatten(0, ids.shape))
        elif num_placeholders:
            assert self.drafter.placeholders is not None, "k is at most the trained one"
            block = self.drafter.placeholders[:num_placeholders]
            parts.append(block.expand(num_blocks, -1, -1))
        if anchors is not None:
            # In the target's type, also where the trained weights are wider.
            parts = [anchors[:, None], *(part.to(anchors.dtype) for part in parts)]
        assert parts, "a block has at least one row"
        block = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if anchors is None:
            return block, torch.ones_like(block[..., :1])
        size = block.shape[1]
        gate = is_placeholder(num_blocks * size, size, block.device)
        return block, gate[:, None].to(block.dtype).unflatten(0, (-1, size))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Uncorrected logits over the output vocabulary.

        Args:
            hidden: ``[B, k, hidden_size]``.

        Returns:
            ``[B, k, V]``.
        """
        if self.drafter.lm_heads is not None:
            return self.drafter.lm_heads(hidden)
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
