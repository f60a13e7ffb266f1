# SPDX-License-Identifier: Apache-2.0
"""The drafter's weights: placeholders, a list of layers, and heads of their own."""

import torch
from torch import nn

from vllm_mtp.drafter.config import (
    DrafterConfig,
    LayerConfig,
    MLPLayerConfig,
    SharedLayerConfig,
)
from vllm_mtp.drafter.heads import (
    ChainInput,
    DraftVocab,
    MarkovCorrection,
    OwnHeads,
)
from vllm_mtp.drafter.layers import (
    MLPLayer,
    OwnLayer,
    PositionLinear,
    SharedLayer,
)


class Drafter(nn.Module):
    """Every trained weight of a drafter, and nothing of the target's.

    Its ``state_dict`` is the checkpoint's list of tensors.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        facts = config.target
        positions, hidden = config.num_speculative_tokens, facts.hidden_size
        self.placeholders = (
            nn.Parameter(
                torch.empty(config.num_placeholders, hidden),
                # The target's own embeddings are not trained.
                requires_grad=config.noise is None,
            )
            if config.num_placeholders
            else None
        )
        self.extra_rows = (
            nn.Parameter(torch.empty(config.extra_rows, hidden))
            if config.extra_rows
            else None
        )
        mixed = len(config.boundary_layers)
        self.boundary_mix = nn.Parameter(torch.empty(mixed)) if mixed > 1 else None
        self.chain = (
            ChainInput(hidden, config.chain.rms_norm_eps) if config.chain else None
        )

        def layer_of(layer: LayerConfig) -> nn.Module:
            if isinstance(layer, SharedLayerConfig):
                return SharedLayer(layer, facts)
            if isinstance(layer, MLPLayerConfig):
                return MLPLayer(layer, hidden, positions)
            return OwnLayer(layer, facts, positions)

        self.layers = nn.ModuleList(map(layer_of, config.layers))
        size = config.draft_vocab_size
        self.lm_heads = (
            OwnHeads(positions, hidden, config.num_draftable_tokens)
            if config.lm_head == "own"
            else None
        )
        self.draft_vocab = DraftVocab(size) if size else None
        self.markov = (
            MarkovCorrection(
                config.markov.rank,
                facts.hidden_size,
                facts.vocab_size,
                config.num_draftable_tokens,
            )
            if config.markov
            else None
        )

    def init_weights(self, generator: torch.Generator) -> None:
        """Start values of all that is not copied from the target."""
        for module in (*self.layers, self.markov, self.lm_heads, self.chain):
            if module is not None:
                module.init_weights(generator)  # type: ignore[operator]
        for weight in (self.extra_rows, self.boundary_mix):
            if weight is not None:
                nn.init.zeros_(weight)

    def weights_by_position(self) -> dict[str, int]:
        """Tensors whose first dimension is positions of the draft, by name: which
        position their first entry is of."""
        found: dict[str, int] = {}
        for path, module in self.named_modules():
            if isinstance(module, PositionLinear | OwnHeads):
                found |= {f"{path}.{name}": 0 for name, _ in module.named_parameters()}
            elif isinstance(module, MLPLayer) and module.has_biases_by_position:
                found[f"{path}.down_bias"] = 0
        if self.placeholders is not None:
            found["placeholders"] = 1  # the first position is the anchor's
        return found
