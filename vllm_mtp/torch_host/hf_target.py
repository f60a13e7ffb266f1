# SPDX-License-Identifier: Apache-2.0
"""A transformers model as the drafter's target host: training and offline checks."""

import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.models.auto import AutoModelForCausalLM

from vllm_mtp.drafter.host import OneRank
from vllm_mtp.drafter.layers import Stream
from vllm_mtp.drafter.target_facts import (
    TargetFacts,
    layers_with_attention,
    sliding_windows,
)
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.torch_host.block_attention import BlockBias, attend_blocks, block_bias
from vllm_mtp.torch_host.followed import fix_rope, require_followed


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
    folder: Path | str, dtype: str, device: torch.device | str
) -> PreTrainedModel:
    """A target's model, ready to be read and never to be trained.

    Args:
        folder: Its Hugging Face folder.
        dtype: Such as ``"bfloat16"``, or ``"auto"`` for its own.
        device: Where it goes.

    Raises:
        UnsupportedTargetError: Its weights cannot be loaded.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UnsupportedTargetError(
            f"--target {folder}: its weights cannot be loaded ({error}); expected a "
            "Hugging Face folder of a causal language model"
        ) from None
    return model.to(device).eval().requires_grad_(False)


class _Read(NamedTuple):
    """What the blocks behind one sequence read."""

    states: TargetStates
    biases: dict[int | None, BlockBias]  # by the layers' windows

    @property
    def num_rows(self) -> int:
        return next(iter(self.biases.values())).prefix.shape[0]


class _LayerWays(NamedTuple):
    """What a layer's attention does besides attending."""

    rotates: bool
    sinks: torch.Tensor | None  # [heads]


class HFTarget(OneRank):
    """A frozen causal LM of transformers as `drafter.host.TargetHost`.

    Args:
        model: A causal LM; eager or SDPA attention. RoPE that depends on the text's
            length (longrope) is fixed in place, see `followed.fix_rope`.

    Raises:
        UnsupportedTargetError: The model computes something that the torch host
            does not.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        TargetFacts.from_hf_config(model.config)  # refuses what no host can follow
        config = model.config.get_text_config()
        _refuse_unfollowed(config)
        self.model = model
        self.decoder = model.get_decoder()
        self._windows = sliding_windows(config)
        self._soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._logit_scale: float = getattr(config, "logit_scale", None) or 1.0
        self._ways: dict[int, _LayerWays] = {}
        self._reads: list[_Read] = []
        fix_rope(self.decoder)
        require_followed(self)

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
        # No config: every layer then keeps its whole prefix, also where the
        # model's own sliding window would drop it.
        cache = DynamicCache()
        with _outputs_of(self.decoder.layers, streams) as outputs:
            out = self.decoder(token_ids[None], past_key_values=cache, use_cache=True)
        layers: list[Any] = cache.layers  # of attention, so with keys and values
        kept = range(len(layers)) if cached is None else sorted(set(cached))
        return TargetStates(
            {i: layers[i].keys[0] for i in kept},
            {i: layers[i].values[0] for i in kept},
            out.last_hidden_state[0],
            outputs,
        )

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
            _Read(
                states,
                {
                    window: block_bias(lens, num_draft_tokens, window, prefix_window)
                    for window in set(self._windows)
                },
            )
            for states, lens in blocks
        ]
        try:
            with self._attention_is_ours():
                yield
        finally:
            self._reads = []

    @contextmanager
    def _attention_is_ours(self) -> Iterator[None]:
        """Layers hand their queries to `_attend_in_layer`, not to their own kernel."""
        config = self.decoder.config
        before = config._attn_implementation
        config._attn_implementation = _OURS
        try:
            yield
        finally:
            config._attn_implementation = before

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings()(token_ids)

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
        hidden = stream.summed()[None]
        out = layer(
            hidden,
            # Any object passes through a layer to the attention function.
            attention_mask=attend,
            position_ids=positions[None],
            past_key_values=None,
            use_cache=False,
            position_embeddings=self._cos_sin(index, hidden, positions),
        )
        return Stream((out[0] if isinstance(out, tuple) else out)[0])

    def rotate(
        self,
        index: int,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._ways_of(index).rotates:
            return query, key
        attention = self._attention(index)
        apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb")  # noqa: B009
        cos, sin = self._cos_sin(index, query, positions)
        query, key = apply(
            self._heads(index, query)[None], self._heads(index, key)[None], cos, sin
        )
        return _rows(query[0]), _rows(key[0])

    def attend(
        self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        query, key, value = (self._heads(index, x) for x in (query, key, value))
        scale, sinks = self._attention(index).scaling, self._ways_of(index).sinks
        return self._attend_heads(index, query, key, value, scale, sinks)

    def _attend_heads(
        self,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """``[heads, rows, head_dim]`` each, to ``[rows, heads * head_dim]``."""
        assert self._reads, "call within HFTarget.reading()"
        counts = [read.num_rows for read in self._reads]
        parts = [rows.split(counts, dim=1) for rows in (query, key, value)]
        outputs = []
        for read, q, k, v in zip(self._reads, *parts, strict=True):
            past = read.states.keys[index], read.states.values[index]
            bias = read.biases[self._windows[index]]
            outputs.append(attend_blocks(q, k, v, *past, bias, scale, sinks))
        return torch.cat(outputs)

    @torch.no_grad()
    def _ways_of(self, index: int) -> _LayerWays:
        """Seen by running the target's layer on one row, at two positions."""
        if index not in self._ways:
            keys: list[torch.Tensor] = []
            found: list[torch.Tensor | None] = []

            def look(
                query: torch.Tensor,
                key: torch.Tensor,
                value: torch.Tensor,
                scale: float,
                sinks: torch.Tensor | None,
            ) -> torch.Tensor:
                keys.append(key)
                found.append(sinks)
                return _rows(value.repeat_interleave(len(query) // len(value), dim=0))

            embedding: Any = self.model.get_input_embeddings().weight
            row = Stream(torch.linspace(-1, 1, embedding.shape[1]).to(embedding)[None])
            attend = _InLayer(look, self._windows[index])
            with self._attention_is_ours():
                for position in (0, 100):
                    at = torch.tensor([position], device=embedding.device)
                    self._run_layer(self.layer(index), index, row, at, attend)
            near, far = keys
            self._ways[index] = _LayerWays(not near.equal(far), found[0])
        return self._ways[index]

    def final_norm(self, stream: Stream) -> torch.Tensor:
        return self.decoder.norm(stream.summed())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(hidden)
        return _shaped(logits, self._soft_cap, self._logit_scale)

    def logits_of_tokens(self, token_ids: torch.Tensor) -> nn.Module:
        head = self.model.get_output_embeddings()
        if head.bias is not None:
            raise UnsupportedTargetError(
                "the target's LM head has a bias, which a reduced draft vocabulary "
                "does not support. Use a drafter with draft_vocab_size null."
            )
        rows = head.weight.detach()[token_ids]
        return _SmallHead(rows, self._soft_cap, self._logit_scale)

    def _cos_sin(self, index: int, like: torch.Tensor, positions: torch.Tensor) -> Any:
        rotary: Any = self.decoder.rotary_emb
        if "layer_type" in inspect.signature(type(rotary).forward).parameters:
            kind = self.decoder.config.layer_types[index]
            return rotary(like, positions[None], kind)
        return rotary(like, positions[None])

    def _attention(self, index: int) -> Any:
        return self.layer(index).self_attn

    def _heads(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        """``[rows, heads * head_dim]`` to ``[heads, rows, head_dim]``."""
        head_dim = self._attention(index).head_dim
        return rows.unflatten(-1, (-1, head_dim)).transpose(0, 1)


class _SmallHead(nn.Module):
    """The rows of the target's LM head that belong to some tokens."""

    def __init__(
        self, weight: torch.Tensor, soft_cap: float | None, scale: float
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.soft_cap, self.scale = soft_cap, scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., hidden_size]`` to ``[..., tokens]``."""
        logits = nn.functional.linear(hidden, self.weight)
        return _shaped(logits, self.soft_cap, self.scale)


def _shaped(logits: torch.Tensor, soft_cap: float | None, scale: float) -> torch.Tensor:
    """What follows the LM head, in vLLM's order."""
    if soft_cap is not None:
        logits = torch.tanh(logits / soft_cap) * soft_cap
    return logits if scale == 1.0 else logits * scale


def _refuse_unfollowed(config: Any) -> None:
    # vLLM does these in `compute_logits` and in its attention when serving.
    names = ("logits_scaling", "attn_logit_softcapping")
    found = [name for name in names if getattr(config, name, None) not in (None, 1.0)]
    if config.model_type in ("gemma", "gemma2"):
        # In some versions of transformers in the model's forward, in others not.
        found.append("scaled embeddings")
    kinds: list[str] = getattr(config, "layer_types", None) or []
    if any("chunked" in kind for kind in kinds):
        found.append("chunked attention")
    readable = layers_with_attention(config)
    if others := sorted({kinds[i] for i in set(range(len(kinds))) - set(readable)}):
        found.append(f"layers without keys and values per token ({', '.join(others)})")
    if found:
        raise UnsupportedTargetError(
            f"target {config.model_type!r} uses {', '.join(found)}, which the torch "
            "drafter does not support yet; use another target"
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


_Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor | None],
    torch.Tensor,
]
"""From query ``[heads, rows, head_dim]``, key and value ``[kv_heads, rows, head_dim]``,
the factor of the scores and sinks ``[heads]`` to ``[rows, heads * head_dim]``."""


class _InLayer(NamedTuple):
    """What stands in for a layer's attention."""

    attend: _Attend
    window: int | None


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
    out = in_layer.attend(query[0], key[0], value[0], scaling, s_aux)
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
