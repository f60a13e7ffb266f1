# SPDX-License-Identifier: Apache-2.0
"""A transformers model as the drafter's target host: training and offline checks."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from vllm_mtp.drafter.followed import (
    embedding_scale,
    last_norm_of,
    require_followed,
)
from vllm_mtp.drafter.host import OneRank
from vllm_mtp.drafter.layers import Stream
from vllm_mtp.drafter.target_facts import (
    TargetFacts,
    layers_with_attention,
    sliding_windows,
)
from vllm_mtp.drafter.transformers_layers import Rope, attention_of, run_rows
from vllm_mtp.errors import MTPError, UnsupportedTargetError, in_one_line
from vllm_mtp.torch_host.block_attention import (
    Scoring,
    attend_blocks,
)
from vllm_mtp.torch_host.flex_blocks import attend_blocks_by_flex
from vllm_mtp.torch_host.followed import constants_of, fix_rope, run_target
from vllm_mtp.torch_host.head import SmallHead, shaping_of
from vllm_mtp.torch_host.layer_attention import InLayer, attention_is_ours
from vllm_mtp.torch_host.load import decoder_of
from vllm_mtp.torch_host.target_states import Read, TargetStates


class _LayerWays(NamedTuple):
    """What a layer's attention does besides attending."""

    rotates: bool
    scoring: Scoring


# By layer, the keys and values [G, B, D] of a chain's rows so far.
_Chained = dict[int, list[tuple[torch.Tensor, torch.Tensor]]]


class HFTarget(OneRank):
    """A frozen causal LM of transformers as `drafter.host.TargetHost`.

    The model may be divided over several devices by accelerate's hooks (`load_frozen`).
    Every method gives its result where its arguments are; only the keys and values of
    `TargetStates` stay on their layers' devices.

    Args:
        model: A causal LM; eager or SDPA attention. RoPE that depends on the text's
            length (longrope) is fixed in place, see `followed.fix_rope`.
        device: Where the drafter and the texts are; by default where the model begins.
        by_flex: Whether blocks attend by FlexAttention, not in slices.

    Raises:
        UnsupportedTargetError: The model computes something that the torch host
            does not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device | None = None,
        *,
        by_flex: bool = False,
    ) -> None:
        TargetFacts.from_hf_config(model.config)  # refuses what no host can follow
        config = model.config.get_text_config()
        self.model = model
        self.device = model.device if device is None else device
        self._by_flex = by_flex
        self.decoder = decoder_of(model)
        self._windows = sliding_windows(config)
        self._with_cache = layers_with_attention(config)
        self._shaping = shaping_of(config)
        self._ways: dict[int, _LayerWays] = {}
        self._reads: list[Read] = []
        self._chained: _Chained | None = None
        self._embedding_scale = 1.0
        fix_rope(self.decoder)
        self._ropes = {index: Rope(self.decoder, index) for index in self._with_cache}
        try:
            self._look()
        except MTPError:
            raise
        except Exception as error:  # of the model's own code
            raise UnsupportedTargetError(
                f"target {config.model_type!r} cannot be run layer by layer "
                f"({in_one_line(error, 300)}), so the torch drafter does not "
                "support it; use another target"
            ) from None

    @torch.no_grad()
    def _look(self) -> None:
        """Learn how the target calls its layers; refuse one that is not followed."""
        kind = self.decoder.config.model_type
        seen, calls = run_target(self.model, self.decoder, self.device)
        self._constants = {
            i: constants_of(self.layer(i), call, kind) for i, call in calls.items()
        }
        self._without_rope = {
            i
            for i, call in calls.items()
            if call.arguments.get("position_embeddings", ()) is None
        }
        embedded = self.embed(seen.token_ids)
        self._embedding_scale = embedding_scale(embedded, seen.entering[0])
        # A block reads a prefix, so there is none for the first token.
        rows = slice(1, None)
        blocks = [(self.encode(seen.token_ids), seen.positions[rows])]
        with self.reading(blocks, 1):
            require_followed(self, seen, self._with_cache, rows, kind)

    def on(self, model: PreTrainedModel) -> "HFTarget":
        """A host of another model of the same family and layers, whose sizes and
        weights may differ: what was learnt by running this one holds there.

        Args:
            model: Need not be able to compute (fake tensors).
        """
        ways = {index: self._ways_of(index) for index in self._with_cache}
        other = copy(self)
        other.model, other.decoder = model, decoder_of(model)
        fix_rope(other.decoder)
        other._ropes = {i: Rope(other.decoder, i) for i in self._with_cache}
        other._ways, other._reads = ways, []
        return other

    @torch.no_grad()
    def encode(
        self,
        token_ids: torch.Tensor,
        *,
        cached: Collection[int] | None = None,
        streams: Collection[int] = (),
    ) -> TargetStates:
        """Run the target over one sequence.

        Args:
            token_ids: ``[T]`` int64.
            cached: Layers whose keys and values are kept; all by default.
            streams: Layers whose output is kept too.
        """
        cache = self.empty_cache()
        with outputs_of(self.decoder.layers, streams) as outputs:
            out = self.decoder(token_ids[None], past_key_values=cache, use_cache=True)
        layers: list[Any] = cache.layers
        kept = self._with_cache if cached is None else sorted(set(cached))
        return TargetStates(
            {i: layers[i].keys[0] for i in kept},
            {i: layers[i].values[0] for i in kept},
            out.last_hidden_state[0].to(token_ids.device),
            {index: out[0].to(token_ids.device) for index, out in outputs.items()},
        )

    def empty_cache(self) -> DynamicCache:
        """Every layer with keys and values keeps its whole prefix, also where the
        model's own sliding window would drop it."""
        if len(self._with_cache) == len(self.decoder.layers):
            return DynamicCache()
        cache = DynamicCache(config=self.decoder.config)
        for index in self._with_cache:
            cache.layers[index] = DynamicLayer()
        return cache

    @contextmanager
    def reading(
        self,
        blocks: Sequence[tuple[TargetStates, torch.Tensor]],
        num_draft_tokens: int,
        prefix_window: int | None = None,
        *,
        causal: bool = True,
        chain: bool = False,
    ) -> Iterator[None]:
        """Set what the rows of the next forward read.

        Args:
            blocks: For each sequence its states and the prefix lengths ``[B]`` of
                the blocks behind it. The rows come in the same order.
            num_draft_tokens: k.
            prefix_window: The drafter's; None for all of the prefix.
            causal: Whether a row reads only rows of its block that stand before it.
            chain: Whether each of the next k forwards has one row of each block, which
                reads those of the forwards before.
        """
        self._reads = [
            Read(states, lens, num_draft_tokens, prefix_window, causal)
            for states, lens in blocks
        ]
        self._chained = {} if chain else None
        try:
            with attention_is_ours(self.decoder.config):
                yield
        finally:
            self._reads, self._chained = [], None

    def recomputed(self, layer: Callable[..., Stream], *inputs: Any) -> Stream:
        """A layer's output, which keeps nothing but its inputs for the backward.

        Call it within `reading`; the backward may come behind it.

        Args:
            layer: Computes the same each time.
            inputs: Its arguments.
        """
        if not torch.is_grad_enabled() or self._chained is not None:
            return layer(*inputs)  # a chain's rows keep little, one layer at a time
        reads = self._reads

        @contextmanager
        def reading_again() -> Iterator[None]:
            before, self._reads = self._reads, reads
            try:
                with attention_is_ours(self.decoder.config):
                    yield
            finally:
                self._reads = before

        return checkpoint(
            layer,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), reading_again()),
        )

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        embedded = self.model.get_input_embeddings()(token_ids).to(token_ids.device)
        scale = self._embedding_scale
        return embedded if scale == 1.0 else embedded * scale

    def layer(self, index: int) -> nn.Module:
        return self.decoder.layers[index]

    def sliding_window(self, index: int) -> int | None:
        return self._windows[index]

    def run_layer(
        self,
        layer: Callable[..., Any],
        index: int,
        stream: Stream,
        positions: torch.Tensor,
    ) -> Stream:
        attend = InLayer(partial(self._attend_heads, index), self._windows[index])
        return self._run_layer(layer, index, stream, positions, attend)

    def _run_layer(
        self,
        layer: Callable[..., Any],
        index: int,
        stream: Stream,
        positions: torch.Tensor,
        attend: InLayer,
    ) -> Stream:
        hidden = stream.summed()
        factors = None
        if index not in self._without_rope:
            factors = self._ropes[index].factors(hidden, positions)
        others = {
            name: {} if isinstance(value, Mapping) else value
            for name, value in self._constants[index].items()
        }
        # Any object passes through a layer to the attention function.
        out = run_rows(layer, hidden, positions, attend, factors, **others)
        return Stream(out.to(hidden.device))

    def rotate(
        self,
        index: int,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._ways_of(index).rotates:
            return query, key
        return self._ropes[index].rotate(positions, query, key)

    def attend(
        self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        query, key, value = (self._heads(index, x) for x in (query, key, value))
        scoring = self._ways_of(index).scoring
        if scoring.sinks is not None:
            scoring = scoring._replace(sinks=scoring.sinks.to(query.device))
        return self._attend_heads(index, query, key, value, scoring)

    def _attend_heads(
        self,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,
    ) -> torch.Tensor:
        """``[heads, rows, head_dim]`` each, to ``[rows, heads * head_dim]``."""
        assert self._reads, "call within HFTarget.reading()"
        counts = [read.num_rows for read in self._reads]
        position = None
        if self._chained is not None:
            before = self._chained.setdefault(index, [])
            position = len(before)
            before.append((key, value))
            counts = [len(read.prefix_lens) for read in self._reads]
            key, value = (
                torch.stack(rows, dim=2).flatten(1, 2)
                for rows in zip(*before, strict=True)
            )
        own = [count * (1 if position is None else position + 1) for count in counts]
        parts = [query.split(counts, dim=1)]
        parts += [rows.split(own, dim=1) for rows in (key, value)]
        outputs = []
        for read, q, k, v in zip(self._reads, *parts, strict=True):
            keys = read.states.keys[index].to(q.device)
            values = read.states.values[index].to(q.device)
            window = self._windows[index]
            if self._by_flex and position is None:
                mask = read.mask(window, q.device)
                out = attend_blocks_by_flex(q, k, v, keys, values, mask, scoring)
            else:
                slices = read.slices(window, len(q), q.device)
                if position is not None:
                    slices = [part.of_position(position) for part in slices]
                out = attend_blocks(q, k, v, keys, values, slices, scoring)
            outputs.append(out)
        return torch.cat(outputs)

    @torch.no_grad()
    def _ways_of(self, index: int) -> _LayerWays:
        """Seen by running the target's layer on one row, at two positions."""
        if index not in self._ways:
            keys: list[torch.Tensor] = []
            found: list[Scoring] = []

            def look(
                query: torch.Tensor,
                key: torch.Tensor,
                value: torch.Tensor,
                scoring: Scoring,
            ) -> torch.Tensor:
                keys.append(key)
                found.append(scoring)
                return _rows(value.repeat_interleave(len(query) // len(value), dim=0))

            embedding: Any = self.model.get_input_embeddings().weight
            row = Stream(torch.linspace(-1, 1, embedding.shape[1]).to(embedding)[None])
            attend = InLayer(look, self._windows[index])
            with attention_is_ours(self.decoder.config):
                for position in (0, 100):
                    at = torch.tensor([position], device=embedding.device)
                    self._run_layer(self.layer(index), index, row, at, attend)
            near, far = keys
            self._ways[index] = _LayerWays(not near.equal(far), found[0])
        return self._ways[index]

    def final_norm(self, stream: Stream) -> torch.Tensor:
        hidden = stream.summed()
        return last_norm_of(self.decoder)(hidden).to(hidden.device)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(hidden)
        return self._shaping.of(logits.to(hidden.device))

    def logits_of_tokens(self, token_ids: torch.Tensor) -> nn.Module:
        head = self.model.get_output_embeddings()
        if head.bias is not None:
            raise UnsupportedTargetError(
                "the target's LM head has a bias, which a reduced draft vocabulary "
                "does not support. Use a drafter with draft_vocab_size null."
            )
        rows = head.weight.detach()[token_ids.to(head.weight.device)]
        rows = rows.to(token_ids.device)
        return SmallHead(rows, self._shaping)

    def _attention(self, index: int) -> Any:
        return attention_of(self.layer(index))

    def _heads(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        """``[rows, heads * head_dim]`` to ``[heads, rows, head_dim]``."""
        head_dim = self._attention(index).head_dim
        return rows.unflatten(-1, (-1, head_dim)).transpose(0, 1)


@contextmanager
def outputs_of(
    layers: nn.ModuleList, wanted: Collection[int]
) -> Iterator[dict[int, torch.Tensor]]:
    """Keep what some decoder layers give in the forward inside the block, by layer:
    ``[texts, T, hidden_size]``."""
    outputs: dict[int, torch.Tensor] = {}

    def keep(index: int, _: nn.Module, __: Any, output: Any) -> None:
        outputs[index] = output[0] if isinstance(output, tuple) else output

    hooks = [layers[i].register_forward_hook(partial(keep, i)) for i in set(wanted)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _rows(heads: torch.Tensor) -> torch.Tensor:
    """``[heads, rows, head_dim]`` to ``[rows, heads * head_dim]``."""
    return heads.transpose(0, 1).flatten(1)
