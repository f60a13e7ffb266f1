# SPDX-License-Identifier: Apache-2.0
"""One layer of a target, alone: whether an own layer is a copy of it, measured.

Neither the target's other weights nor its cache are needed: both layers run on a few
random rows, which read each other.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from vllm_mtp.drafter.config import OwnLayerConfig
from vllm_mtp.drafter.followed import difference
from vllm_mtp.drafter.host import OneRank
from vllm_mtp.drafter.layers import BlockRows, OwnLayer, Stream
from vllm_mtp.drafter.target_facts import TargetFacts, sliding_windows
from vllm_mtp.drafter.transformers_layers import Rope, attention_of, run_rows
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.torch_host.block_attention import Scoring
from vllm_mtp.torch_host.layer_attention import attention_by
from vllm_mtp.torch_host.layer_copy import LayerCopy, readings
from vllm_mtp.torch_host.load import class_of, decoder_of

_ROWS = 8
_SAME = 1e-4


class OneLayer(OneRank):
    """A target's layer, and what an own layer needs of its target.

    Args:
        hf_config: The target's.
        index: Which layer.
        weights: Of the layer, named from the layer on.

    Raises:
        UnsupportedTargetError: The weights are not those of the layer.
    """

    def __init__(
        self, hf_config: Any, index: int, weights: Mapping[str, torch.Tensor]
    ) -> None:
        with torch.device("meta"):
            model = class_of(hf_config).from_config(hf_config, dtype=torch.float32)
        self._decoder = decoder_of(model.eval())
        # Made anew, with what else a layer may hold besides its weights.
        self._layer = type(self._decoder.layers[index])(self._decoder.config, index)
        self._layer = self._layer.float().eval()
        found = {name: weight.float() for name, weight in weights.items()}
        problems = self._layer.load_state_dict(found, strict=False)
        if odd := sorted([*problems.missing_keys, *problems.unexpected_keys]):
            raise UnsupportedTargetError(
                f"layer {index} of the target cannot be built from its weights: "
                f"differing {odd[:8]}. Use shared layers, or --own-init random."
            )
        rotary = getattr(self._decoder, "rotary_emb", None)
        if rotary is not None:  # its factors are no weights
            self._decoder.rotary_emb = type(rotary)(config=self._decoder.config)
        self._rope = Rope(self._decoder, index)
        self._attention = attention_of(self._layer)
        self._scoring = Scoring(self._attention.scaling)
        self._window = sliding_windows(self._decoder.config)[index]
        self._rotates = True
        # Queries, keys and values that attention was given last, and what came out.
        self.parts: dict[str, torch.Tensor] = {}

    def rotate(
        self,
        index: int,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `TargetHost`."""
        if not self._rotates:
            return query, key
        return self._rope.rotate(positions, query, key)

    def attend(
        self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """As in `TargetHost`; the rows read each other, causally."""
        query, key, value = map(self._per_head, (query, key, value))
        return self._attend(query, key, value, self._scoring)

    def _per_head(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(-1, (-1, self._attention.head_dim)).transpose(0, 1)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,
    ) -> torch.Tensor:
        """``[heads, rows, head_dim]`` each to ``[rows, heads * head_dim]``."""
        self.parts |= {"queries": query, "keys": key, "values": value}
        # The same for both layers, so sinks and caps are no matter here.
        out = F.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            is_causal=True,
            scale=scoring.scale,
            enable_gqa=True,
        )
        out = out[0].transpose(0, 1).flatten(1)
        self.parts["attention"] = out
        return out

    @torch.no_grad()
    def run(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The target's layer. ``[rows, hidden_size]``."""
        parameters = inspect.signature(self._layer.forward).parameters
        extra: dict[str, Any] = (
            {"shared_kv_states": {}} if "shared_kv_states" in parameters else {}
        )
        with attention_by(self._decoder.config, self._attend, self._window) as mask:
            factors = self._rope.factors(rows, positions)
            return run_rows(self._layer, rows, positions, mask, factors, **extra)

    @torch.no_grad()
    def look(self, rows: torch.Tensor) -> None:
        """See whether the layer rotates its keys."""
        keys = []
        for position in (0, 100):
            self.run(rows, torch.full((len(rows),), position))
            keys.append(self.parts["keys"])
        self._rotates = difference(keys[0], keys[1]) > _SAME


def copy_of_layer(
    hf_config: Any,
    index: int,
    weights: Mapping[str, torch.Tensor],
    make: Callable[[dict[str, Any]], OwnLayerConfig],
    facts: TargetFacts,
) -> LayerCopy:
    """The reading of a target's layer that gives what the layer gives.

    Args:
        hf_config: The target's, whole.
        index: Which layer.
        weights: Of the layer, named from the layer on.
        make: The own layer's config with some fields.
        facts: The target's.

    Raises:
        UnsupportedTargetError: None does; it says in which part the best one differs.
    """
    facts_of_layer = facts.of_layer(index)
    candidates = list(readings(weights, hf_config.get_text_config(), facts_of_layer))
    target = OneLayer(hf_config, index, weights)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_ROWS, facts.hidden_size, generator=generator)
    positions = torch.arange(_ROWS) + 3
    target.look(rows)
    expected = target.run(rows, positions)
    alone = BlockRows(1)
    parts = dict(target.parts)
    closest: tuple[float, str] | None = None
    for candidate in candidates:
        layer = OwnLayer(make(candidate.form), facts, 1)
        shapes = {name: weight.shape for name, weight in candidate.weights.items()}
        if {n: weight.shape for n, weight in layer.named_parameters()} != shapes:
            continue
        layer.load_state_dict({n: w.float() for n, w in candidate.weights.items()})
        with torch.no_grad():
            out = layer(target, Stream(rows), positions, None, alone).summed()
        error = difference(out, expected)
        if error <= _SAME:
            return candidate
        differing = (
            name
            for name, part in parts.items()
            if not _difference(target.parts[name], part) <= _SAME
        )
        if closest is None or error < closest[0]:
            closest = error, next(differing, "what follows attention")
    error, wrong = closest or (float("nan"), "its weights' shapes")
    raise UnsupportedTargetError(
        f"layer {index} of the target ({type(target._layer).__name__}) cannot be "
        "copied into an own layer: of all forms that fit its weights, the closest "
        f"gives rows that differ by {error:.2g} (relative), and first in: {wrong}. Use "
        "shared layers, or --own-init random."
    )


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of parts ``[heads, rows, head_dim]`` or ``[rows, heads * head_dim]``."""
    if found.shape != expected.shape:
        return float("inf")
    return difference(found.flatten()[None], expected.flatten()[None])
