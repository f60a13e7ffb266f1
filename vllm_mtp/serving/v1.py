# SPDX-License-Identifier: Apache-2.0
"""The V1 runner's drafter: a stock ``DraftModelProposer`` with another forward."""

import logging
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from vllm_mtp.block import (
    PAD_SLOT,
    FittedBlocks,
    block_positions,
    fit_blocks,
    slots_of_positions,
)
from vllm_mtp.modeling.heads import pick_greedy
from vllm_mtp.plugin import METHOD
from vllm_mtp.serving.loading import load_bound_drafter, require_one_kv_cache_group

logger = logging.getLogger("vllm.mtp_placeholder")


class MTPPlaceholderProposer(DraftModelProposer):
    """Drafts all tokens of a step in one forward over the target's KV cache."""

    runner: Any  # set by the base class

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

    def validate_same_kv_cache_group(self, kv_cache_config: KVCacheConfig) -> None:
        """Refuse bound layers that lie in several KV-cache groups."""
        require_one_kv_cache_group(kv_cache_config, self._draft_attn_layer_names)

    @torch.inference_mode()
    def propose(
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
    ) -> torch.Tensor:
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
            ``[B, k]`` int64 token ids.
        """
        self.num_speculative_tokens = num_speculative_tokens
        self._last_draft_probs = None
        if num_speculative_tokens == 0:
            return next_token_ids.new_empty(len(next_token_ids), 0, dtype=torch.int64)
        metadata = common_attn_metadata
        prefix_lens = metadata.seq_lens
        if num_rejected_tokens_gpu is not None:
            prefix_lens = prefix_lens - num_rejected_tokens_gpu
        boundary = None
        if self._bound.drafter.config.uses_boundary_hidden:
            last = token_indices_to_sample
            last = metadata.query_start_loc[1:] - 1 if last is None else last
            boundary = target_hidden_states[last]
        hidden = self._forward(
            next_token_ids, prefix_lens, boundary, metadata, num_speculative_tokens
        )
        tokens, probs = self._draft(hidden, sampling_metadata)
        self._last_draft_probs = None if probs is None else probs.contiguous()
        return tokens

    def _forward(
        self,
        anchor_ids: torch.Tensor,
        prefix_lens: torch.Tensor,
        boundary: torch.Tensor | None,
        metadata: CommonAttentionMetadata,
        num_places: int,
    ) -> torch.Tensor:
        """Run the drafter's blocks. ``[B, k, hidden_size]``."""
        table = self._block_table(metadata)
        readable_len = table.shape[1] * self.block_size
        blocks = fit_blocks(prefix_lens, num_places, self._max_model_len, readable_len)
        draft_metadata = self._block_metadata(blocks, table, readable_len, metadata)
        _, per_layer = self.build_per_group_and_layer_attn_metadata(draft_metadata)
        with set_forward_context(
            per_layer,
            self.vllm_config,
            num_tokens=blocks.positions.numel(),
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=dict.fromkeys(
                self._draft_attn_layer_names, draft_metadata.slot_mapping
            ),
        ):
            return self._bound.forward(anchor_ids, blocks.positions, boundary)

    @property
    def _max_model_len(self) -> int:
        # vLLM may lower the limit after start-up, to what the cache holds.
        return self.vllm_config.model_config.max_model_len

    def _block_table(self, metadata: CommonAttentionMetadata) -> torch.Tensor:
        """The block table of the bound layers' KV-cache group. ``[B, M]`` int32."""
        table = metadata.block_table_tensor
        if self.kv_cache_gid <= 0:
            return table
        # The runner hands over the table of group 0 for this kind of drafter.
        tables = self.runner.input_batch.block_table
        return tables[self.kv_cache_gid].get_device_tensor(len(table))

    def _block_metadata(
        self,
        blocks: FittedBlocks,
        table: torch.Tensor,
        readable_len: int,
        metadata: CommonAttentionMetadata,
    ) -> CommonAttentionMetadata:
        """The drafter's batch: k query rows behind every request's prefix."""
        batch, num_places = blocks.positions.shape
        slots = slots_of_positions(blocks.positions, table, self.block_size)
        upper = metadata.seq_lens_cpu_upper_bound
        if upper is not None:
            # Some backends index the block table by this bound.
            upper = (upper + num_places).clamp(max=readable_len)
        return metadata.replace(
            query_start_loc=self.arange[: batch + 1] * num_places,
            query_start_loc_cpu=torch.arange(batch + 1, dtype=torch.int32) * num_places,
            seq_lens=blocks.seq_lens.to(metadata.seq_lens.dtype),
            seq_lens_cpu_upper_bound=upper,
            num_actual_tokens=batch * num_places,
            max_query_len=num_places,
            max_seq_len=min(metadata.max_seq_len + num_places, readable_len),
            block_table_tensor=table,
            slot_mapping=slots.masked_fill(blocks.beyond, PAD_SLOT).flatten(),
            positions=blocks.positions.flatten(),
            causal=True,
        )

    def _draft(
        self, hidden: torch.Tensor, sampling_metadata: SamplingMetadata
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self._enable_probabilistic_draft_probs or sampling_metadata.all_greedy:
            return self._bound.draft(hidden, pick_greedy)

        def pick(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            return self._sample_from_logits(logits.float(), sampling_metadata)

        return self._bound.draft(hidden, pick, whole_vocab=True)

    @torch.inference_mode()
    def dummy_run(self, num_tokens: int, *_: Any, **__: Any) -> None:
        """Run once without a cache, so that vLLM's memory profile sees the drafter."""
        # As many rows as a step can have, also where the budget of tokens is less.
        num_places = self.speculative_config.num_speculative_tokens
        batch = self.max_batch_size
        ids = torch.zeros(batch, dtype=torch.int64, device=self.device)
        boundary = None
        if self._bound.drafter.config.uses_boundary_hidden:
            boundary = self.hidden_states.new_zeros(batch, self.hidden_size)
        with set_forward_context(None, self.vllm_config, num_tokens=batch * num_places):
            positions = block_positions(ids, num_places)
            hidden = self._bound.forward(ids, positions, boundary)
            self._bound.draft(hidden, pick_greedy)
