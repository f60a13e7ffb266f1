# SPDX-License-Identifier: Apache-2.0
"""vLLM's target model as the drafter's host.

The paged cache is read and the scratch slots are written by the target's own
``Attention`` modules, under the drafter's forward context. So layout, type and
scales of the cache are vLLM's business, whatever the backend.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig, get_layers_from_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import extract_layer_index

from vllm_mtp.drafter.config import DrafterConfig, OwnLayerConfig
from vllm_mtp.drafter.followed import (
    Seen,
    difference,
    embedding_scale,
    last_norm_of,
    require_followed,
)
from vllm_mtp.drafter.layers import Stream
from vllm_mtp.drafter.shadow import shadow
from vllm_mtp.drafter.sharding import Rank
from vllm_mtp.drafter.target_facts import TargetFacts, layers_without_values
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.serving.connectors import no_connector
from vllm_mtp.serving.kernels import product_with
from vllm_mtp.serving.layer_calls import (
    NativeLayer,
    TransformersLayer,
    first_of,
    layer_of,
)
from vllm_mtp.serving.layer_ways import (
    LayerWays,
    TargetRun,
    attention_of_values,
    layer_ways,
    norm_adds_residual,
    random_rows,
    run_target,
    stream_of,
)


def this_rank() -> Rank:
    """This process among those that share the target's layers."""
    return Rank(
        get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    )


# Of logits, the head's weights in 8 bits.
_CLOSE = 0.05


class VllmTarget:
    """A loaded vLLM model as `drafter.host.TargetHost`.

    Args:
        model: The runner's target model.
        vllm_config: The target's config.
        config: The drafter's, of this rank.

    Raises:
        UnsupportedTargetError: A bound layer has no ordinary attention, or the
            model's layers, one by one, do not give what the model gives.

    Attributes:
        dtype: Of the target's stream, and so of drafters on it.
    """

    dtype: torch.dtype

    def __init__(
        self,
        model: nn.Module,
        vllm_config: VllmConfig,
        config: DrafterConfig,
    ) -> None:
        facts = config.target
        self._model, self._decoder = _parts_of(model)
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype), "vLLM resolved it before"
        self.dtype = dtype
        self._vllm_config = vllm_config
        self._no_connector = no_connector(vllm_config)
        self._max_model_len = vllm_config.model_config.max_model_len
        self._without_values = layers_without_values(
            vllm_config.model_config.hf_text_config
        )
        attention = _attention_by_layer(vllm_config)
        self._attention: dict[int, Attention] = {}
        self._layers: dict[int, NativeLayer | TransformersLayer] = {}
        self._ways: dict[int, LayerWays] = {}
        self._embedding_scale = 1.0
        self._small_head: _SmallHead | None = None
        run = run_target(
            model, self._model, self._decoder, facts.vocab_size, vllm_config
        )
        self._own = {
            layer.target_layer
            for layer in config.layers
            if isinstance(layer, OwnLayerConfig)
        }
        self._read = config.read_layers
        # Heads refer to no layer; how the target treats its stream is seen on one.
        some = next(iter(facts.cached_layers or sorted(attention)))
        for index in config.bound_layers or (some,):
            self._bind(index, attention, facts, run)
        device = next(self._decoder.parameters()).device
        self._norm = last_norm_of(self._decoder)
        self._norm_adds = norm_adds_residual(
            self._norm, facts.hidden_size, dtype, device
        )
        self._require_followed(run, config.shared_layers, facts)

    def keys_are_values(self, index: int) -> bool:
        return index in self._without_values

    @property
    def attention_layer_names(self) -> set[str]:
        """vLLM's names of the attention layers that the drafter reads."""
        return {self._attention[index].layer_name for index in self._read}

    def _bind(
        self,
        index: int,
        attention: dict[int, Attention],
        facts: TargetFacts,
        run: TargetRun,
    ) -> None:
        layer = self._decoder.layers[index]
        if index not in attention:
            raise UnsupportedTargetError(
                f"target layer {index} ({type(layer).__name__}) has no ordinary "
                "attention, so there is no KV cache to read (MLA, mamba or linear "
                f"attention?). Bind to one of the layers {sorted(attention)}."
            )
        _require_heads(index, attention[index], facts)
        found: Any = attention[index]
        if index in self._own and found.head_size_v != found.head_size:
            raise UnsupportedTargetError(
                f"target layer {index} has values of size {found.head_size_v} and keys "
                f"of size {found.head_size}, which own layers do not; use shared layers"
            )
        if attention[index].kv_sharing_target_layer_name is not None:
            raise UnsupportedTargetError(
                f"target layer {index} reads the KV cache of "
                f"{attention[index].kv_sharing_target_layer_name!r} and writes none of "
                "its own; bind to that layer instead"
            )
        self._attention[index] = attention[index]
        how = layer_of(self._decoder, index, run.calls[index], run.positions)
        ways = layer_ways(
            layer,
            partial(how.run, layer),
            facts.hidden_size,
            self.dtype,
            self._vllm_config,
        )
        needs_rope = index in self._own and ways.rotates
        if needs_rope and isinstance(how, NativeLayer) and how.rotary is None:
            raise UnsupportedTargetError(
                f"target layer {index} ({type(layer).__name__}) has no single "
                "`rotary_emb`, which a drafter's queries need; this architecture is "
                "not supported"
            )
        self._layers[index], self._ways[index] = how, ways

    @torch.inference_mode()
    def _require_followed(
        self, run: TargetRun, shared_layers: Iterable[int], facts: TargetFacts
    ) -> None:
        """Refuse a target of which the layers, one by one, give something else."""
        # All layers of a model treat the residual alike.
        carries = any(ways.carries_residual for ways in self._ways.values())

        def stream(values: Iterable[Any]) -> torch.Tensor:
            rows = [
                value
                for value in values
                if isinstance(value, torch.Tensor) and value.is_floating_point()
            ]
            both = (rows[0], rows[1] if len(rows) > 1 else None)
            # In the target's type, which is what its norms take.
            return stream_of(both, carries).flatten(0, -2).to(self.dtype)

        calls = [run.calls[index] for index in range(len(run.calls))]
        results = [
            c.result if isinstance(c.result, tuple) else [c.result] for c in calls
        ]
        seen = Seen(
            run.token_ids,
            run.positions,
            [stream(call.arguments.values()) for call in calls],
            [stream(result) for result in results],
            run.hidden,
            run.logits,
        )
        self._embedding_scale = embedding_scale(
            self.embed(seen.token_ids), seen.entering[0]
        )
        with (
            attention_of_values(self._decoder),
            set_forward_context(None, self._vllm_config, num_tokens=len(seen.hidden)),
        ):
            name = facts.name or facts.model_type
            require_followed(self, seen, shared_layers, slice(None), name)

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        return tensor_model_parallel_all_reduce(partial)

    def without_all_reduce(self, linear: Any) -> nn.Module | None:
        # vLLM's `RowParallelLinear`, of any quantisation.
        if not (getattr(linear, "reduce_results", False) and linear.tp_size > 1):
            return None
        partial: Any = copy.copy(linear)
        partial.reduce_results = False
        return partial

    def sliding_window(self, index: int) -> int | None:
        window: int | None = self._attention[index].sliding_window
        return None if window is None or window >= self._max_model_len else window

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        embedded = self._model.embed_input_ids(token_ids)
        scale = self._embedding_scale
        return embedded if scale == 1.0 else embedded * scale

    def layer(self, index: int) -> nn.Module:
        layer = self._decoder.layers[index]
        stand_ins = {
            path: _FiniteAttention(module)
            for path, module in layer.named_modules()
            if isinstance(module, Attention)
        }
        return shadow(layer, stand_ins)

    def run_layer(
        self,
        layer: Callable[..., Any],
        index: int,
        stream: Stream,
        positions: torch.Tensor,
    ) -> Stream:
        run = self._layers[index].run
        if not self._ways[index].carries_residual:
            return Stream(first_of(run(layer, stream.summed(), None, positions)))
        return Stream(*run(layer, stream.hidden, stream.residual, positions))

    def rotate(
        self,
        index: int,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._ways[index].rotates:
            return query, key
        return self._layers[index].rotate(positions, query, key)

    def attend(
        self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        return self._attention[index](query, _finite(key), _finite(value))

    def final_norm(self, stream: Stream) -> torch.Tensor:
        norm = self._norm
        if stream.residual is None or not self._norm_adds:
            return first_of(norm(stream.summed()))
        return norm(stream.hidden, stream.residual)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.compute_logits(hidden)

    @contextmanager
    def forward_context(
        self,
        metadata: dict[str, Any] | None,
        num_rows: int,
        slots: dict[str, torch.Tensor] | None,
    ) -> Iterator[None]:
        """What a forward of the drafter runs in.

        Args:
            metadata: Attention metadata by layer; None without a cache.
            num_rows: Of the drafter's batch.
            slots: ``[num_rows]`` int64 by layer; None without a cache.
        """
        replicas = self._vllm_config.parallel_config.data_parallel_size
        rows_of_replicas = None
        if replicas > 1:
            # Made up, or vLLM would ask the others, who may be drafting nothing. Only
            # experts would read it, and no draft runs any then (`require_parts`).
            rows_of_replicas = torch.full((replicas,), num_rows, dtype=torch.int32)
        with (
            self._no_connector(),
            set_forward_context(
                metadata,
                self._vllm_config,
                num_tokens=num_rows,
                num_tokens_across_dp=rows_of_replicas,
                cudagraph_runtime_mode=CUDAGraphMode.NONE,
                slot_mapping=slots,
            ),
        ):
            yield

    def follow_weights(self) -> None:
        """Take the target's weights anew where this host has copies of them.

        To be called before every draft: nobody tells that they were changed while
        serving.
        """
        if self._small_head is not None:
            self._small_head.follow()

    def take_weights(self) -> None:
        """As `follow_weights`, whether they have changed or not."""
        if self._small_head is not None:
            self._small_head.take()

    @torch.inference_mode()
    def logits_of_tokens(self, token_ids: torch.Tensor) -> nn.Module:
        small = _SmallHead(self._model, token_ids, self.dtype)
        self._small_head = small
        (rows,) = random_rows(
            1, self._model.lm_head.weight.shape[1], self.dtype, token_ids.device
        )
        error = difference(small(rows), self.logits(rows)[:, token_ids])
        if not error <= _CLOSE:
            raise UnsupportedTargetError(
                f"the target ({type(self._model).__name__}) does more behind its LM "
                f"head than scale and cap: logits of a reduced draft vocabulary differ "
                f"by {error:.2g} (relative). Use a drafter with draft_vocab_size null."
            )
        return small


def _finite(states: torch.Tensor) -> torch.Tensor:
    """Keys or values without NaN and infinity.

    They go to scratch slots, which the target's attention masks and yet multiplies
    with 0; of NaN and infinity that makes NaN in the target's own output.
    """
    return states.nan_to_num(0.0, 0.0, 0.0)


class _FiniteAttention(nn.Module):
    """A shared layer's attention, which writes what `_finite` leaves."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._modules["attention"] = attention

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        return self.attention(query, _finite(key), _finite(value), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("attention"), name)


# Drafts after which a device, or one of several ranks, takes its rows of the head anew:
# to look whether they have changed would make the host wait for the one, and the other
# ranks wait in a collective.
_DRAFTS_BETWEEN = 1024
# Rows that are taken at a time: nobody reckoned with more memory while serving.
_AT_ONCE = 1024


class _SmallHead(nn.Module):
    """The rows of the target's LM head that belong to a reduced vocabulary.

    The rows are gathered once; a whole head per draft would undo the saving. Each
    rank keeps an equal share of them: the head's own shares would be lopsided, since
    frequent tokens have low ids.
    """

    def __init__(
        self, model: Any, token_ids: torch.Tensor, model_dtype: object
    ) -> None:
        super().__init__()
        head: Any = getattr(model, "lm_head", None)
        processor = model.logits_processor
        method = getattr(head, "quant_method", None)
        plain = isinstance(method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
        same_dtype = getattr(processor, "head_dtype", None) in (None, model_dtype)
        known = isinstance(head, VocabParallelEmbedding)
        if not known or not plain or not same_dtype or _has_bias(head):
            raise UnsupportedTargetError(
                f"the target's LM head ({type(head).__name__}) is missing, quantised, "
                "of another type or has a bias; a reduced draft vocabulary needs a "
                "plain one. Use a drafter with draft_vocab_size null."
            )
        self._head: Any = [head]  # not a part of this module
        self._token_ids = token_ids
        self.num_tokens = len(token_ids)
        rank = this_rank()
        share = -(-self.num_tokens // rank.size)
        self._first = share * rank.index
        # Zeros fill the last rank's up.
        rows = head.weight.new_zeros(share, head.weight.shape[1])
        self.weight = nn.Parameter(rows, requires_grad=False)
        self._can_look = token_ids.device.type == "cpu" and rank.size == 1
        self._drafts = 0
        self._some = token_ids[:: max(1, self.num_tokens // 64)]
        self.take()
        self.scale: float = processor.scale
        self.soft_cap: float | None = processor.soft_cap

    def follow(self) -> None:
        """Take the rows anew, if they have changed or it has been long enough."""
        self._drafts += 1
        if self._can_look:
            if torch.equal(self._a_few(), self._seen):
                return
        elif self._drafts % _DRAFTS_BETWEEN:
            return
        self.take()

    def _a_few(self) -> torch.Tensor:
        """Numbers of the head, all over its rows."""
        head: torch.Tensor = self._head[0].weight
        return head[self._some, self._some % head.shape[1]]

    def take(self) -> None:
        """Take the rows anew, where the kernels have them."""
        for start in range(0, self.num_tokens, _AT_ONCE):
            ids = self._token_ids[start : start + _AT_ONCE]
            rows = _rows_of_all_ranks(self._head[0], ids)
            # The part of them that is this rank's.
            first = max(start, self._first)
            end = min(start + len(ids), self._first + len(self.weight))
            if first < end:
                mine = self.weight.data[first - self._first : end - self._first]
                mine.copy_(rows[first - start : end - start])
        if self._can_look:
            self._seen = self._a_few()
        self._product = product_with(self)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, hidden_size]`` to ``[rows, tokens]``."""
        logits = self._product(hidden)
        logits = tensor_model_parallel_all_gather(logits)[:, : self.num_tokens]
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits * self.scale if self.scale != 1.0 else logits


def _rows_of_all_ranks(head: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Rows of an LM head whose vocabulary is shared out. ``[tokens, hidden_size]``."""
    shard = head.shard_indices
    start, end = shard.org_vocab_start_index, shard.org_vocab_end_index
    is_here = (start <= token_ids) & (token_ids < end)
    rows = head.weight.detach()[torch.where(is_here, token_ids - start, 0)]
    # Each row is on one rank, so the sum only collects them.
    rows = rows.masked_fill(~is_here[:, None], 0)
    return rows if head.tp_size == 1 else tensor_model_parallel_all_reduce(rows)


def _has_bias(head: Any) -> bool:
    return getattr(head, "bias", None) is not None


def _parts_of(model: Any) -> tuple[Any, Any]:
    """What embeds tokens and gives logits, and the decoder with the layers.

    Of a model that may be multimodal; the text part of some has no head of its own.
    """
    inner = (
        model.get_language_model() if hasattr(model, "get_language_model") else model
    )
    for owner, decoder in ((inner, getattr(inner, "model", None)), (model, inner)):
        if hasattr(decoder, "layers") and last_norm_of(decoder) is not None:
            return owner, decoder
    raise UnsupportedTargetError(
        f"{type(inner).__name__} has no `model.layers` with a norm behind them; this "
        "architecture is not supported"
    )


def _attention_by_layer(vllm_config: VllmConfig) -> dict[int, Attention]:
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    return {extract_layer_index(name): layer for name, layer in layers.items()}


def _require_heads(index: int, attention: Attention, facts: TargetFacts) -> None:
    facts = facts.of_layer(index)
    got = (attention.num_heads, attention.num_kv_heads, attention.head_size)
    expected = (facts.num_attention_heads, facts.num_key_value_heads, facts.head_dim)
    if got != expected:
        raise UnsupportedTargetError(
            f"target layer {index} has (heads, KV heads, head size) {got}, the "
            f"drafter was made for {expected}; use a drafter made for this target"
        )
