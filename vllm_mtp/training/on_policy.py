# SPDX-License-Identifier: Apache-2.0
"""Spans that a drafter has drafted itself, scored by its target: on-policy training.

Behind true text a drafter never meets its own mistakes. Here the frozen target reads
what the drafter drafts behind an anchor, and says at each position how it would go on
from there, as the student's own span is scored in multi-token prediction by
self-distillation (arXiv 2602.06019; of speculative drafters, Draft-OPD, 2605.29343).

Dimensions: B blocks, k positions.
"""

from collections.abc import Sequence

import torch
from pydantic import ValidationError

from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.config import DrafterConfig, SharedLayerConfig
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.errors import MTPError, refusal_of
from vllm_mtp.torch_host.texts import TextBlocks, forward_texts
from vllm_mtp.training.token_loss import Spans
from vllm_mtp.training.walk import draft_greedily


class Verifier:
    """The target along the spans that a drafter drafts.

    A block of tokens behind known text is what a drafter that shares all of the target
    and changes nothing computes where the tokens stand in place of its placeholders.

    Args:
        bound: A drafter on the target.

    Raises:
        MTPError: The target has layers without keys and values.
    """

    def __init__(self, bound: BoundDrafter) -> None:
        config = _of_target_alone(bound.drafter.config)
        with torch.device("meta"):  # its placeholders are never read
            drafter = Drafter(config)
        self._target = BoundDrafter(drafter, bound.target)
        self.read_layers = config.read_layers

    @torch.no_grad()
    def spans(self, texts: Sequence[TextBlocks], tokens: torch.Tensor) -> Spans:
        """Let the target read what is drafted behind every anchor.

        Args:
            texts: The blocks' texts, with the keys and values of all layers.
            tokens: ``[B, k]`` int64, from `draft_greedily`.
        """
        k = tokens.shape[1]
        read = forward_texts(self._target, on_tokens(texts, tokens), k)
        return Spans(tokens, draft_greedily(self._target, texts, read, k), read)


def on_tokens(texts: Sequence[TextBlocks], tokens: torch.Tensor) -> list[TextBlocks]:
    """The same blocks on drafted tokens ``[B, k]``, but for the last, behind which
    nothing stands."""
    counts = [len(text.prefix_lens) for text in texts]
    parts = tokens[:, :-1].split(counts)
    return [
        text._replace(noise_ids=part) for text, part in zip(texts, parts, strict=True)
    ]


def _of_target_alone(config: DrafterConfig) -> DrafterConfig:
    facts = config.target
    try:
        return DrafterConfig(
            model_type="mtp_placeholder",
            format_version=1,
            num_speculative_tokens=config.num_speculative_tokens,
            layers=tuple(
                SharedLayerConfig(target_layer=index)
                for index in range(facts.num_hidden_layers)
            ),
            dtype=config.dtype,
            target=facts,
        )
    except ValidationError as error:
        raise MTPError(
            "on_policy_weight: the target has to read what the drafter drafts, through "
            f"the keys and values of all its layers ({refusal_of(error)}); leave it out"
        ) from None
