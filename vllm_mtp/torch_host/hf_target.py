# SPDX-License-Identifier: Apache-2.0
"""A transformers model as the drafter's target host: training and offline checks."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.auto import AutoModelForCausalLM, AutoModelForImageTextToText

from vllm_mtp.drafter.followed import (
    embedding_scale,
    last_norm_of,
    require_followed,
)
from vllm_mtp.drafter.host import OneRank
from vllm_mtp.drafter.layers import Stream
from vllm_mtp.drafter.target_facts import (
    TargetFacts,
    hf_config_of,
    layers_with_attention,
    sliding_windows,
)
from vllm_mtp.drafter.transformers_layers import Rope, attention_of, run_rows
from vllm_mtp.errors import MTPError, UnsupportedTargetError
from vllm_mtp.torch_host.block_attention import (
    BlockSlice,
    Scoring,
    attend_blocks,
    block_slices,
)
from vllm_mtp.torch_host.flex_blocks import attend_blocks_by_flex, flex_mask
from vllm_mtp.torch_host.followed import constants_of, fix_rope, run_target


@dataclass(frozen=True)
class TargetStates:
    """What the target has computed for one sequence of T tokens.

    Keys carry RoPE already, exactly as vLLM's cache holds them.
    """

    keys: dict[int, torch.Tensor]  # layer -> [kv_heads, T, head_dim]
    values: dict[int, torch.Tensor]  # layer -> [kv_heads, T, head_dim]
    hidden: torch.Tensor  # [T, hidden_size], after the final norm
    # layer -> [T, hidden_size], the residual stream behind it; only if asked for
    streams: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.hidden.shape[0]


def load_frozen(
    folder: Path | str,
    dtype: str,
    device: torch.device | str,
    device_map: str | Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A target's model, ready to be read and never to be trained.

    Args:
        folder: Its Hugging Face folder.
        dtype: Such as ``"bfloat16"``, or ``"auto"`` for its own.
        device: Where it goes.
        device_map: How accelerate divides it over GPUs, such as
            ``"balanced_low_0"``, or a device for each part; None for ``device`` alone.

    Raises:
        UnsupportedTargetError: Its weights cannot be loaded, or not all of them have
            room on the GPUs.
    """
    config = hf_config_of(folder)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    try:
        model, found = class_of(config).from_pretrained(
            folder,
            dtype=dtype,
            # torch's own attention leaves the cap out.
            attn_implementation="eager" if capped else None,
            output_loading_info=True,
            device_map=device_map,
        )
        # transformers fills them with random numbers.
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"{len(missing)} of its tensors are missing, such as {missing[0]}; a "
                "quantised target's config must say how its weights are stored"
            )
        placed = getattr(model, "hf_device_map", {}) if device_map is not None else {}
        _require_on_gpus(placed)
        if not placed:  # on one device, and accelerate had nothing to divide
            # A quantised model may refuse to be moved.
            model = model.to(device)
        return model.eval().requires_grad_(False)
    except Exception as error:  # of files, quantisers, their packages, the device ...
        reason = " ".join(str(error).split())[:500]
        raise UnsupportedTargetError(
            f"--target {folder}: its weights cannot be loaded ({reason}); expected a "
            "Hugging Face folder of a causal language model"
        ) from None


def _require_on_gpus(placed: Mapping[str, Any]) -> None:
    elsewhere = [name for name, at in placed.items() if str(at) in ("cpu", "disk")]
    if elsewhere:
        raise ValueError(
            f"{len(elsewhere)} of its parts, such as {elsewhere[0]}, have no room on "
            "the GPUs that there are; use more of them, or a quantised target"
        )


def class_of(config: Any) -> Any:
    """transformers' class for a target: of language models, or of those that see."""
    texts_only = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if texts_only else AutoModelForImageTextToText


@dataclass
class _Read:
    """What the blocks behind one sequence read."""

    states: TargetStates
    prefix_lens: torch.Tensor  # [B] int64
    num_draft_tokens: int
    prefix_window: int | None
    _seen: dict[Any, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(self.prefix_lens) * self.num_draft_tokens

    def slices(
        self, window: int | None, num_heads: int, device: torch.device
    ) -> list[BlockSlice]:
        """For all layers of one window and number of heads, where their queries are."""
        key = (window, num_heads, device)
        if key not in self._seen:
            self._seen[key] = block_slices(
                self.prefix_lens.to(device),
                self.num_draft_tokens,
                num_heads,
                window,
                self.prefix_window,
            )
        return self._seen[key]  # type: ignore[no-any-return]

    def mask(self, window: int | None, device: torch.device) -> BlockMask:
        """For all layers of one window."""
        key = (window, device)
        if key not in self._seen:
            self._seen[key] = flex_mask(
                self.prefix_lens.to(device),
                self.num_draft_tokens,
                window,
                self.prefix_window,
            )
        return self._seen[key]


class _LayerWays(NamedTuple):
    """What a layer's attention does besides attending."""

    rotates: bool
    scoring: Scoring


class HFTarget(OneRank):
    """A frozen causal LM of transformers as `drafter.host.TargetHost`.

    The model may be divided over several devices by accelerate's hooks (`load_frozen`).
    Every method gives its result where its arguments are; only the keys and values of
    `TargetStates` stay on their layers' devices.

    Args:
        model: A causal LM; eager or SDPA attention. RoPE that depends on the text's
            length (longrope) is fixed in place, see `followed.fix_rope`.
        device: Where the drafter and the texts are; by default where the model begins.

    Attributes:
        by_flex: Blocks attend by FlexAttention, not in slices.

    Raises:
        UnsupportedTargetError: The model computes something that the torch host
            does not.
    """

    by_flex = False

    def __init__(
        self, model: PreTrainedModel, device: torch.device | None = None
    ) -> None:
        TargetFacts.from_hf_config(model.config)  # refuses what no host can follow
        config = model.config.get_text_config()
        self.model = model
        self.device = model.device if device is None else device
        self.decoder = decoder_of(model)
        self._windows = sliding_windows(config)
        self._with_cache = layers_with_attention(config)
        self._shaping = _shaping_of(config)
        self._ways: dict[int, _LayerWays] = {}
        self._reads: list[_Read] = []
        self._embedding_scale = 1.0
        fix_rope(self.decoder)
        self._ropes = {index: Rope(self.decoder, index) for index in self._with_cache}
        try:
            self._look()
        except MTPError:
            raise
        except Exception as error:  # of the model's own code
            reason = " ".join(str(error).split())[:300]
            raise UnsupportedTargetError(
                f"target {config.model_type!r} cannot be run layer by layer "
                f"({type(error).__name__}: {reason}), so the torch drafter does not "
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
        with _outputs_of(self.decoder.layers, streams) as outputs:
            out = self.decoder(token_ids[None], past_key_values=cache, use_cache=True)
        layers: list[Any] = cache.layers
        kept = self._with_cache if cached is None else sorted(set(cached))
        return TargetStates(
            {i: layers[i].keys[0] for i in kept},
            {i: layers[i].values[0] for i in kept},
            out.last_hidden_state[0].to(token_ids.device),
            {index: out.to(token_ids.device) for index, out in outputs.items()},
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
    ) -> Iterator[None]:
        """Set what the rows of the next forward read.

        Args:
            blocks: For each sequence its states and the prefix lengths ``[B]`` of
                the blocks behind it. The rows come in the same order.
            num_draft_tokens: k.
            prefix_window: The drafter's; None for all of the prefix.
        """
        self._reads = [
            _Read(states, lens, num_draft_tokens, prefix_window)
            for states, lens in blocks
        ]
        try:
            with _attention_is_ours(self.decoder.config):
                yield
        finally:
            self._reads = []

    def recomputed(self, layer: Callable[..., Stream], *inputs: Any) -> Stream:
        """A layer's output, which keeps nothing but its inputs for the backward.

        Call it within `reading`; the backward may come behind it.

        Args:
            layer: Computes the same each time.
            inputs: Its arguments.
        """
        if not torch.is_grad_enabled():
            return layer(*inputs)
        reads = self._reads

        @contextmanager
        def reading_again() -> Iterator[None]:
            before, self._reads = self._reads, reads
            try:
                with _attention_is_ours(self.decoder.config):
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
        attend = _InLayer(partial(self._attend_heads, index), self._windows[index])
        return self._run_layer(layer, index, stream, positions, attend)

    def _run_layer(
        self,
        layer: Callable[..., Any],
        index: int,
        stream: Stream,
        positions: torch.Tensor,
        attend: "_InLayer",
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
        parts = [rows.split(counts, dim=1) for rows in (query, key, value)]
        outputs = []
        for read, q, k, v in zip(self._reads, *parts, strict=True):
            keys = read.states.keys[index].to(q.device)
            values = read.states.values[index].to(q.device)
            window = self._windows[index]
            if self.by_flex:
                mask = read.mask(window, q.device)
                out = attend_blocks_by_flex(q, k, v, keys, values, mask, scoring)
            else:
                slices = read.slices(window, len(q), q.device)
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
            attend = _InLayer(look, self._windows[index])
            with _attention_is_ours(self.decoder.config):
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
        return _SmallHead(rows, self._shaping)

    def _attention(self, index: int) -> Any:
        return attention_of(self.layer(index))

    def _heads(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        """``[rows, heads * head_dim]`` to ``[heads, rows, head_dim]``."""
        head_dim = self._attention(index).head_dim
        return rows.unflatten(-1, (-1, head_dim)).transpose(0, 1)


def decoder_of(model: Any) -> Any:
    """The part with the layers; some families take the whole model for it."""
    decoder = model.get_decoder()
    return decoder if hasattr(decoder, "layers") else decoder.model


class _SmallHead(nn.Module):
    """The rows of the target's LM head that belong to some tokens."""

    def __init__(self, weight: torch.Tensor, shaping: "_Shaping") -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.shaping = shaping

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., hidden_size]`` to ``[..., tokens]``."""
        return self.shaping.of(nn.functional.linear(hidden, self.weight))


class _Shaping(NamedTuple):
    """What follows the LM head: a factor, a cap, and another factor."""

    before: float
    soft_cap: float | None
    after: float

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        """Same shape."""
        if self.before != 1.0:
            logits = logits * self.before
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits if self.after == 1.0 else logits * self.after


def _shaping_of(config: Any) -> _Shaping:
    def number(name: str) -> float:
        return getattr(config, name, None) or 1.0

    return _Shaping(
        number("output_multiplier"),
        getattr(config, "final_logit_softcapping", None),
        number("logit_scale") / number("logits_scaling"),
    )


@contextmanager
def _outputs_of(
    layers: nn.ModuleList, wanted: Collection[int]
) -> Iterator[dict[int, torch.Tensor]]:
    """Keep what some decoder layers give in the forward inside the block."""
    outputs: dict[int, torch.Tensor] = {}

    def keep(index: int, _: nn.Module, __: Any, output: Any) -> None:
        outputs[index] = (output[0] if isinstance(output, tuple) else output)[0]

    hooks = [layers[i].register_forward_hook(partial(keep, i)) for i in set(wanted)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _rows(heads: torch.Tensor) -> torch.Tensor:
    """``[heads, rows, head_dim]`` to ``[rows, heads * head_dim]``."""
    return heads.transpose(0, 1).flatten(1)


_Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scoring], torch.Tensor]
"""From query ``[heads, rows, head_dim]``, key and value ``[kv_heads, rows, head_dim]``
to ``[rows, heads * head_dim]``."""


class _InLayer(NamedTuple):
    """What stands in for a layer's attention."""

    attend: _Attend
    window: int | None


@contextmanager
def _attention_is_ours(config: Any) -> Iterator[None]:
    """Layers hand their queries to `_attend_in_layer`, not to their own kernel."""
    before = config._attn_implementation
    config._attn_implementation = _OURS
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def attention_by(config: Any, attend: _Attend, window: int | None) -> Iterator[Any]:
    """Layers attend by a function of ours.

    Args:
        config: The decoder's.
        attend: The function.
        window: Of the layer that runs.

    Yields:
        What a layer is given for a mask.
    """
    with _attention_is_ours(config):
        yield _InLayer(attend, window)


# Of the layer's call: what they say is in the rows already, or is nothing to attention.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "cache_position", "past_key_values", "use_cache"}
    | {"output_attentions", "output_hidden_states", "position_embeddings"}
)


def _attend_in_layer(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    *,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: ``[1, heads, rows, head_dim]`` each."""
    in_layer: _InLayer = attention_mask
    odd = {
        name: setting
        for name, setting in rest.items()
        if setting is not None and name not in _WITHOUT_EFFECT
    }
    if dropout:
        odd["dropout"] = dropout
    if is_causal is False:
        odd["is_causal"] = is_causal
    if sliding_window not in (None, in_layer.window) and not _reads_all(
        module, sliding_window
    ):
        odd["sliding_window"] = sliding_window
    if odd:
        raise UnsupportedTargetError(
            f"{type(module).__name__} gives its attention {_shown(odd)}, which the "
            "torch drafter does not follow, so a drafter would be trained on other "
            "states than it is served on; use another target"
        )
    scoring = Scoring(scaling, s_aux, softcap)
    out = in_layer.attend(query[0], key[0], value[0], scoring)
    return out.unflatten(-1, (query.shape[1], -1))[None], None


def _reads_all(attention: Any, sliding_window: int) -> bool:
    """Whether no text is longer than the window, see `sliding_windows`."""
    longest = getattr(attention.config, "max_position_embeddings", None) or math.inf
    return bool(sliding_window >= longest)


def _shown(settings: dict[str, Any]) -> str:
    return ", ".join(
        name if isinstance(setting, torch.Tensor) else f"{name}={setting!r}"
        for name, setting in settings.items()
    )


_OURS = "vllm_mtp_blocks"
AttentionInterface.register(_OURS, _attend_in_layer)
