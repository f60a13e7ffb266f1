# SPDX-License-Identifier: Apache-2.0
"""A transformers model as the drafter's target host: training and offline checks."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.modeling.hosts import Stream
from vllm_mtp.target import TargetFacts


@dataclass(frozen=True)
class TargetStates:
    """What the target has computed for one sequence of T tokens.

    Keys carry RoPE already, exactly as vLLM's cache holds them.
    """

    keys: dict[int, torch.Tensor]  # layer -> [kv_heads, T, head_dim]
    values: dict[int, torch.Tensor]  # layer -> [kv_heads, T, head_dim]
    hidden: torch.Tensor  # [T, hidden_size], after the final norm

    @property
    def num_tokens(self) -> int:
        return self.hidden.shape[0]


class HFTarget:
    """A frozen causal LM of transformers as `hosts.TargetHost`.

    Args:
        model: A causal LM; eager or SDPA attention.

    Raises:
        UnsupportedTargetError: The model scales embeddings or logits, which the
            torch host does not do.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        TargetFacts.from_hf_config(model.config)  # refuses what no host can follow
        _refuse_scaled(model.config.get_text_config())
        self.model = model
        self.decoder = model.get_decoder()
        self._states: TargetStates | None = None
        self._mask: torch.Tensor | None = None

    @torch.no_grad()
    def encode(self, token_ids: torch.Tensor) -> TargetStates:
        """Run the target over one sequence.

        Args:
            token_ids: ``[T]`` int64.
        """
        # No config: every layer then keeps its whole prefix, also where the
        # model's own sliding window would drop it.
        cache = DynamicCache()
        out = self.decoder(token_ids[None], past_key_values=cache, use_cache=True)
        layers: list[Any] = cache.layers  # of attention, so with keys and values
        return TargetStates(
            {i: layer.keys[0] for i, layer in enumerate(layers)},
            {i: layer.values[0] for i, layer in enumerate(layers)},
            out.last_hidden_state[0],
        )

    @contextmanager
    def reading(self, states: TargetStates, mask: torch.Tensor) -> Iterator[None]:
        """Set what the rows of the next forward read.

        Args:
            states: The prefix.
            mask: ``[rows, T + rows]`` bool, as from `block.block_mask`.
        """
        self._states, self._mask = states, mask
        try:
            yield
        finally:
            self._states = self._mask = None

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings()(token_ids)

    def layer(self, index: int) -> nn.Module:
        return self.decoder.layers[index]

    def run_layer(
        self, layer: nn.Module, index: int, stream: Stream, positions: torch.Tensor
    ) -> Stream:
        self._refuse_window(index)
        hidden = stream.summed()[None]
        out = layer(
            hidden,
            attention_mask=self._layer_mask(hidden.dtype),
            position_ids=positions[None],
            past_key_values=_PrefixThenBlock(self._states),
            use_cache=True,
            position_embeddings=self._cos_sin(hidden, positions),
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
        cos, sin = self._cos_sin(query, positions)
        query, key = apply(
            self._heads(index, query)[None], self._heads(index, key)[None], cos, sin
        )
        return _rows(query[0]), _rows(key[0])

    def attend(
        self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        keys, values = _PrefixThenBlock(self._states).update(
            self._heads(index, key)[None], self._heads(index, value)[None], index
        )
        out = F.scaled_dot_product_attention(
            self._heads(index, query)[None],
            keys,
            values,
            attn_mask=self._mask,
            scale=self._attention(index).scaling,
            enable_gqa=True,
        )
        return _rows(out[0])

    def final_norm(self, stream: Stream) -> torch.Tensor:
        return self.decoder.norm(stream.summed())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.get_output_embeddings()(hidden)

    def logits_of_tokens(self, token_ids: torch.Tensor) -> nn.Module:
        head = self.model.get_output_embeddings()
        if head.bias is not None:
            raise UnsupportedTargetError(
                "the target's LM head has a bias, which a reduced draft vocabulary "
                "does not support. Use a drafter with draft_vocab_size null."
            )
        small = nn.Linear(
            head.in_features, len(token_ids), bias=False, dtype=head.weight.dtype
        )
        small.weight = nn.Parameter(
            head.weight.detach()[token_ids], requires_grad=False
        )
        return small

    def _cos_sin(self, like: torch.Tensor, positions: torch.Tensor) -> Any:
        if not hasattr(self.decoder, "rotary_emb"):
            raise UnsupportedTargetError(
                f"{type(self.decoder).__name__} has no `rotary_emb`; only targets "
                "with one RoPE for all layers are supported by the torch drafter"
            )
        return self.decoder.rotary_emb(like, positions[None])

    def _layer_mask(self, dtype: torch.dtype) -> torch.Tensor:
        assert self._mask is not None, "call within HFTarget.reading()"
        if self.model.config._attn_implementation != "eager":
            return self._mask[None, None]
        # Eager attention adds its mask to the scores.
        added = torch.zeros(self._mask.shape, dtype=dtype, device=self._mask.device)
        return added.masked_fill(~self._mask, torch.finfo(dtype).min)[None, None]

    def _attention(self, index: int) -> Any:
        self._refuse_window(index)
        return self.layer(index).self_attn

    def _refuse_window(self, index: int) -> None:
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        if kinds is not None and kinds[index] != "sliding_attention":
            return
        read = self._mask.shape[1] if self._mask is not None else 0
        if window is not None and read > window:
            raise UnsupportedTargetError(
                f"target layer {index} attends to a window of {window} tokens, and "
                f"{read} are to be read; the torch drafter does not support windows "
                "yet. Use shorter sequences or bind to layers with full attention."
            )

    def _heads(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        """``[rows, heads * head_dim]`` to ``[heads, rows, head_dim]``."""
        head_dim = self._attention(index).head_dim
        return rows.unflatten(-1, (-1, head_dim)).transpose(0, 1)


# Settings by which some families (Gemma, Granite) scale their logits outside the LM
# head. vLLM's own `compute_logits` does it when serving.
_SCALES = ("logits_scaling", "final_logit_softcapping")


def _refuse_scaled(config: Any) -> None:
    found = [name for name in _SCALES if getattr(config, name, None) not in (None, 1.0)]
    if config.model_type in ("gemma", "gemma2"):
        found.append("scaled embeddings")
    if found:
        raise UnsupportedTargetError(
            f"target {config.model_type!r} uses {', '.join(found)}, which the torch "
            "drafter does not support yet; use another target"
        )


def _rows(heads: torch.Tensor) -> torch.Tensor:
    """``[heads, rows, head_dim]`` to ``[rows, heads * head_dim]``."""
    return heads.transpose(0, 1).flatten(1)


class _PrefixThenBlock:
    """Looks like a cache to a decoder layer: the stored prefix, then the new rows.

    Nothing is stored, which is what "scratch" means when training.
    """

    def __init__(self, states: TargetStates | None) -> None:
        assert states is not None, "call within HFTarget.reading()"
        self._states = states

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From ``[1, kv_heads, rows, head_dim]`` to ``T + rows`` on axis 2."""
        keys, values = self._states.keys[layer_idx], self._states.values[layer_idx]
        return torch.cat([keys[None], key], 2), torch.cat([values[None], value], 2)
