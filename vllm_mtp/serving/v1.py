# SPDX-License-Identifier: Apache-2.0
"""The V1 runner's drafter: a stock ``DraftModelProposer`` with another forward."""

import logging
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from vllm_mtp.drafter.heads import pick_greedy, pick_with_probability, sure_lengths
from vllm_mtp.drafter.layout import block_positions
from vllm_mtp.drafter.scopes import DRAFT, scope
from vllm_mtp.plugin import METHOD
from vllm_mtp.serving.faults import FILLER_TOKEN, DraftGuard
from vllm_mtp.serving.finished_requests import all_have_ended
from vllm_mtp.serving.lazy_drafts import LateDrafts
from vllm_mtp.serving.loading import load_bound_drafter
from vllm_mtp.serving.sampling import with_seeds
from vllm_mtp.serving.v1_blocks import AlikeLayers, BlockRunner, Blocks, split_by_kind

logger = logging.getLogger("vllm.mtp_placeholder")


class _NoTokenIds:
    """A request whose prompt came as embeddings."""

    def get_token_id(self, _: int) -> int:
        # Used only while the prompt is unfinished, when drafts are thrown away.
        return 0


class MTPPlaceholderProposer(DraftModelProposer):
    """Drafts all tokens of a step in one forward over the target's KV cache.

    Attributes:
        faults: Lets a draft fail.
        skips_ended: Whether to draft nothing where no request goes on.
    """

    faults: DraftGuard
    skips_ended: bool = True

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any):
        super().__init__(vllm_config, device, runner)
        self._runner = runner  # the base class does not keep it
        # Of a draft and those before it together; less likely ones are not verified.
        config: Any = self.speculative_config
        self._min_probability: float = config.min_draft_probability
        self.faults = DraftGuard(alone=vllm_config.parallel_config.world_size == 1)

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Load the drafter and bind it to the loaded target."""
        self._bound, host = load_bound_drafter(
            target_model, self.vllm_config, self.device
        )
        self.model = self._bound.drafter
        self.supports_mm_inputs = False
        if self.speculative_config.enforce_eager is False:
            logger.warning("%s: CUDA graphs of the drafter need the V2 runner", METHOD)
        # The target's own layers: vLLM then builds the drafter's attention
        # metadata for them, and allocates no cache for the drafter.
        self._draft_attn_layer_names = host.attention_layer_names

    def initialize_attn_backend(
        self,
        kv_cache_config: KVCacheConfig,
        kernel_block_sizes: list[int] | None = None,
    ) -> None:
        """Make builders of attention metadata over the target's layers.

        The base class takes all layers for alike: of one KV-cache group, and with
        the first one's window. So it is asked once per kind of layer.
        """
        bound = self._draft_attn_layer_names
        every: list[AlikeLayers] = []
        for names in split_by_kind(bound, self.vllm_config, kv_cache_config):
            self._draft_attn_layer_names = names
            super().initialize_attn_backend(kv_cache_config, kernel_block_sizes)
            kind = self.kv_cache_gid, self.block_size, names, self.draft_attn_groups
            every.append(AlikeLayers(*kind))
        self._draft_attn_layer_names = bound
        # The runner binds the cache to the layers of all of them.
        self.draft_attn_groups = sum((alike.attention_groups for alike in every), [])
        self._blocks = BlockRunner(self._bound, every, self.vllm_config, self._runner)

    def prepare_next_token_ids_padded(
        self,
        sampled_token_ids: torch.Tensor,
        requests: dict[str, Any],
        gpu_input_batch: Any,
        discard_request_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The anchors ``[B]`` int32, and how many sampled tokens are valid ``[B]``.

        The base class asks every request for a token of its prompt, and one whose
        prompt came as embeddings would end the engine.
        """
        if self.vllm_config.model_config.enable_prompt_embeds:
            requests = {
                name: _NoTokenIds() if request.prompt_token_ids is None else request
                for name, request in requests.items()
            }
        return super().prepare_next_token_ids_padded(
            sampled_token_ids, requests, gpu_input_batch, discard_request_mask
        )

    @torch.inference_mode()
    def propose(  # type: ignore[override]
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings: Any = None,
    ) -> torch.Tensor | LateDrafts:
        """Draft for every request of the batch.

        Args:
            num_speculative_tokens: k of this step; 0 skips drafting.
            target_token_ids: Not used.
            target_positions: Not used.
            target_hidden_states: ``[tokens, hidden_size]``, after the final norm.
            next_token_ids: ``[B]`` int32; the anchors.
            token_indices_to_sample: ``[B]`` int32; row of each request's last
                valid token, or None when no draft was verified in this step.
            common_attn_metadata: The target's batch in this step.
            sampling_metadata: Temperatures for probabilistic drafts.
            mm_embed_inputs: Not used.
            num_rejected_tokens_gpu: ``[B]`` int32; drafts rejected in this step.
            slot_mappings: Not used.

        Returns:
            ``[B, k]`` int64 token ids, as `LateDrafts` where `_may_wait` says so; of
            another width only where `_no_drafts` says so.
        """
        self.num_speculative_tokens = num_speculative_tokens
        self._last_draft_probs = None
        if num_speculative_tokens == 0:
            return next_token_ids.new_empty(len(next_token_ids), 0, dtype=torch.int64)
        blocks = self.faults.attempt(
            lambda: self._blocks.blocks(
                num_speculative_tokens,
                next_token_ids,
                target_hidden_states,
                token_indices_to_sample,
                num_rejected_tokens_gpu,
                common_attn_metadata,
            )
        )
        empty = next_token_ids.new_empty(
            (len(next_token_ids), num_speculative_tokens), dtype=torch.int64
        )
        if blocks is None:
            return self._no_drafts(empty)

        draft = partial(self._draft_or_none, blocks, empty, sampling_metadata)
        if not self._may_wait(sampling_metadata):
            return draft()[0]

        def late() -> list[list[int]]:
            if self.skips_ended and self._all_have_ended():
                return self._no_drafts(empty).tolist()
            return self._sure(*draft())

        return LateDrafts(late)

    @torch.inference_mode()
    def _draft_or_none(
        self, blocks: Blocks, empty: torch.Tensor, sampling_metadata: SamplingMetadata
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `_draft`, like ``empty``; or what says that there are none."""
        with scope(DRAFT):
            drafts = self.faults.attempt(
                lambda: self._draft(
                    self._blocks.forward(blocks, self._layer_metadata),
                    blocks.fitted.positions,
                    sampling_metadata,
                )
            )
        return (self._no_drafts(empty), None) if drafts is None else drafts

    def _sure(
        self, tokens: torch.Tensor, probabilities: torch.Tensor | None
    ) -> list[list[int]]:
        """Drafts ``[B, k]``, each cut where the drafter is no longer sure of it."""
        rows: list[list[int]] = tokens.tolist()
        if probabilities is None:
            return rows
        lengths = sure_lengths(probabilities[..., 0], self._min_probability)
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def _may_wait(self, sampling_metadata: SamplingMetadata) -> bool:
        """Whether the drafts can be computed when the scheduler asks for them.

        Not scheduled ahead, nothing else reads them and nothing changes until then;
        but probabilities are taken at once, and of several processes not all are
        asked. A GPU works on drafts beside the host anyway.
        """
        return (
            self.device.type == "cpu"
            and not self._scheduled_ahead
            and self.vllm_config.parallel_config.world_size == 1
            and self._drafts_are_greedy(sampling_metadata)
        )

    def _all_have_ended(self) -> bool:
        """Whether no request of the step, whose tokens were added, goes on."""
        requests = map(self._runner.requests.get, self._runner.input_batch.req_ids)
        return all_have_ended(filter(None, requests), self.num_speculative_tokens + 1)

    @property
    def _scheduled_ahead(self) -> bool:
        return bool(self.vllm_config.scheduler_config.async_scheduling)

    def _drafts_are_greedy(self, sampling_metadata: SamplingMetadata) -> bool:
        probabilistic = self._enable_probabilistic_draft_probs
        return not probabilistic or bool(sampling_metadata.all_greedy)

    def _no_drafts(self, drafts: torch.Tensor) -> torch.Tensor:
        """What says that nothing was drafted, where ``drafts`` ``[B, k]`` were wanted.

        ``[B, 0]`` int64: the scheduler then plans no drafts. Scheduled ahead, it has
        already planned k of them, and the runner reads as many. So they are fillers,
        ``[B, k]`` int64, without probabilities: vLLM takes such drafts for certain
        choices, and verifies, rejects and counts them like any other.
        """
        if not self._scheduled_ahead:
            return drafts[:, :0]
        return torch.full_like(drafts, FILLER_TOKEN)

    def _layer_metadata(
        self, alike: AlikeLayers, metadata: CommonAttentionMetadata
    ) -> dict[str, object]:
        """Attention metadata by layer name."""
        every_group = self.draft_attn_groups
        self.draft_attn_groups = alike.attention_groups
        try:
            return self.build_per_group_and_layer_attn_metadata(metadata)[1]
        finally:
            self.draft_attn_groups = every_group

    def _draft(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens ``[B, k]`` int64, and ``[B, k, 1]`` how likely if asked for."""
        if self._drafts_are_greedy(sampling_metadata):
            pick_best = pick_with_probability if self._min_probability else pick_greedy
            return self._bound.draft(hidden, pick_best)

        def sample(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            return self._sample_from_logits(logits.float(), sampling_metadata)

        pick = with_seeds(sample, sampling_metadata.generators, positions[:, 0])
        tokens, probs = self._bound.draft(hidden, pick, whole_vocab=True)
        self._last_draft_probs = None if probs is None else probs.contiguous()
        return tokens, None

    @torch.inference_mode()
    def dummy_run(self, num_tokens: int, *_: Any, **__: Any) -> None:
        """Run once without a cache, so that vLLM's memory profile sees the drafter."""
        # As many rows as a step can have, also where the budget of tokens is less.
        num_draft_tokens = self.speculative_config.num_speculative_tokens
        batch = self.max_batch_size
        ids = torch.zeros(batch, dtype=torch.int64, device=self.device)
        boundary = None
        if self._bound.drafter.config.uses_boundary_hidden:
            boundary = self.hidden_states.new_zeros(batch, self.hidden_size)
        with set_forward_context(
            None, self.vllm_config, num_tokens=batch * num_draft_tokens
        ):
            positions = block_positions(ids, num_draft_tokens)
            hidden = self._bound.forward(ids, positions, boundary)
            self._bound.draft(hidden, pick_greedy)
