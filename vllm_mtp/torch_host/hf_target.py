# SPDX-License-Identifier: Apache-2.0
"""A transformers model as the drafter's target host: training and offline checks."""

import inspect
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
from vllm_mtp.drafter.target_facts import TargetFacts, sliding_windows
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.torch_host.block_attention import BlockBias, attend_blocks, block_bias


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


class HFTarget(OneRank):
    """A frozen causal LM of transformers as `hosts.TargetHost`.

    Args:
        model: A causal LM; eager or SDPA attention.

    Raises:
        UnsupportedTargetError: The model computes something around its layers
            that the torch host does not.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        TargetFacts.from_hf_config(model.config)  # refuses what no host can follow
        config = model.config.get_text_config()
        _refuse_unfollowed(config)
        self.model = model
        self.decoder = model.get_decoder()
        self._windows = sliding_windows(config)
        self._soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._reads: list[_Read] = []

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
        config = self.decoder.config
        before = config._attn_implementation
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
        # A shared layer hands its queries to `_attend_in_layer`, not to its own kernel.
        config._attn_implementation = _OURS
        try:
            yield
        finally:
            config._attn_implementation = before
            self._reads = []

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
        hidden = stream.summed()[None]
        out = layer(
            hidden,
            # Any object passes through a layer to the attention function.
            attention_mask=partial(self._attend_heads, index),
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
        scale = self._attention(index).scaling
        return self._attend_heads(index, query, key, value, scale)

    def _attend_heads(
        self,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """``[heads, rows, head_dim]`` each, to ``[rows, heads * head_dim]``."""
        assert self._reads, "call within HFTarget.reading()"
        counts = [read.num_rows for read in self._reads]
        parts = [rows.split(counts, dim=1) for rows in (query, key, value)]
        outputs = []
        for read, q, k, v in zip(self._reads, *parts, strict=True):
            past = read.states.keys[index], read.states.values[index]
            bias = read.biases[self._windows[index]]
            outputs.append(attend_blocks(q, k, v, *past, bias, scale))
        return torch.cat(outputs)

    def final_norm(self, stream: Stream) -> torch.Tensor:
        return self.decoder.norm(stream.summed())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return _capped(self.model.get_output_embeddings()(hidden), self._soft_cap)

    def logits_of_tokens(self, token_ids: torch.Tensor) -> nn.Module:
        head = self.model.get_output_embeddings()
        if head.bias is not None:
            raise UnsupportedTargetError(
                "the target's LM head has a bias, which a reduced draft vocabulary "
                "does not support. Use a drafter with draft_vocab_size null."
            )
        return _SmallHead(head.weight.detach()[token_ids], self._soft_cap)

    def _cos_sin(self, index: int, like: torch.Tensor, positions: torch.Tensor) -> Any:
        rotary = getattr(self.decoder, "rotary_emb", None)
        if rotary is None:
            raise UnsupportedTargetError(
                f"{type(self.decoder).__name__} has no `rotary_emb`; only targets "
                "with one for all layers are supported by the torch drafter"
            )
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

    def __init__(self, weight: torch.Tensor, soft_cap: float | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.soft_cap = soft_cap

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., hidden_size]`` to ``[..., tokens]``."""
        return _capped(nn.functional.linear(hidden, self.weight), self.soft_cap)


def _capped(logits: torch.Tensor, soft_cap: float | None) -> torch.Tensor:
    return logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap


def _refuse_unfollowed(config: Any) -> None:
    # vLLM does these in `compute_logits` and in its attention when serving.
    names = ("logits_scaling", "attn_logit_softcapping")
    found = [name for name in names if getattr(config, name, None) not in (None, 1.0)]
    if config.model_type in ("gemma", "gemma2"):
        # In some versions of transformers in the model's forward, in others not.
        found.append("scaled embeddings")
    if any("chunked" in kind for kind in getattr(config, "layer_types", None) or ()):
        found.append("chunked attention")
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


def _attend_in_layer(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: ``[1, heads, rows, head_dim]`` each."""
    out = attention_mask(query[0], key[0], value[0], scaling)
    return out.unflatten(-1, (query.shape[1], -1))[None], None


_OURS = "vllm_mtp_blocks"
AttentionInterface.register(_OURS, _attend_in_layer)
