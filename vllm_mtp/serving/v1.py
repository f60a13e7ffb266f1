# SPDX-License-Identifier: Apache-2.0
"""The V1 runner's drafter: a stock ``DraftModelProposer`` with another forward."""

from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from vllm_mtp.block import block_positions, slots_of_positions
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.modeling.heads import pick_greedy
from vllm_mtp.serving.loading import load_bound_drafter


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
        # The target's own layers: vLLM then builds the drafter's attention
        # metadata for them, and allocates no cache for the drafter.
        self._draft_attn_layer_names = host.attention_layer_names

    def _create_draft_vllm_config(self) -> VllmConfig:
        return self.vllm_config

    def validate_same_kv_cache_group(self, kv_cache_config: KVCacheConfig) -> None:
        """Refuse bound layers that lie in several KV-cache groups."""
        groups = [
            index
            for index, group in enumerate(kv_cache_config.kv_cache_groups)
            if self._draft_attn_layer_names & set(group.layer_names)
        ]
        if len(groups) != 1:
            raise UnsupportedTargetError(
                f"the drafter reads target layers of {len(groups)} KV-cache groups "
                "(full and sliding-window attention?), which the V1 runner's adapter "
                "does not support. Use a drafter bound to layers of one kind."
            )

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
        positions = block_positions(prefix_lens.long(), num_places)
        draft_metadata = self._block_metadata(positions, prefix_lens, metadata)
        _, per_layer = self.build_per_group_and_layer_attn_metadata(draft_metadata)
        num_rows = positions.numel()
        # Runs no graph, but keeps data-parallel ranks in step.
        _, _, across_dp = self._determine_batch_execution_and_padding(
            num_rows, use_cudagraphs=False
        )
        with set_forward_context(
            per_layer,
            self.vllm_config,
            num_tokens=num_rows,
            num_tokens_across_dp=across_dp,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=dict.fromkeys(
                self._draft_attn_layer_names, draft_metadata.slot_mapping
            ),
        ):
            # A row beyond the limit has no slot and drafts nothing of use; only
            # its position must stay inside the RoPE table.
            rows = positions.clamp(max=self._max_model_len - 1)
            return self._bound.forward(anchor_ids, rows, boundary)

    @property
    def _max_model_len(self) -> int:
        # vLLM may lower the limit after start-up, to what the cache holds.
        return self.vllm_config.model_config.max_model_len

    def _block_metadata(
        self,
        positions: torch.Tensor,
        prefix_lens: torch.Tensor,
        metadata: CommonAttentionMetadata,
    ) -> CommonAttentionMetadata:
        """The drafter's batch: k query rows behind every request's prefix."""
        batch, num_places = positions.shape
        table = self._block_table(metadata, num_places)
        starts = torch.arange(batch + 1, dtype=torch.int32) * num_places
        upper = metadata.seq_lens_cpu_upper_bound
        return metadata.replace(
            query_start_loc=starts.to(positions.device, non_blocking=True),
            query_start_loc_cpu=starts,
            seq_lens=(prefix_lens + num_places).to(metadata.seq_lens.dtype),
            seq_lens_cpu_upper_bound=None if upper is None else upper + num_places,
            num_actual_tokens=batch * num_places,
            max_query_len=num_places,
            max_seq_len=metadata.max_seq_len + num_places,
            block_table_tensor=table,
            slot_mapping=slots_of_positions(
                positions, table, self.block_size, self._max_model_len
            ).flatten(),
            positions=positions.flatten(),
            causal=True,
        )

    def _block_table(
        self, metadata: CommonAttentionMetadata, num_places: int
    ) -> torch.Tensor:
        """The bound layers' block table, wide enough for a block at the very end.

        A block whose last rows pass ``max_model_len`` would make the attention
        kernel look beyond the table; there it finds the null block instead.
        """
        table = metadata.block_table_tensor
        if self.kv_cache_gid > 0:
            # The runner hands over the table of group 0 for this kind of drafter.
            tables = self.runner.input_batch.block_table
            table = tables[self.kv_cache_gid].get_device_tensor(len(table))
        missing = self._max_model_len + num_places - table.shape[1] * self.block_size
        if missing <= 0:
            return table
        extra = -(-missing // self.block_size)
        return torch.nn.functional.pad(table, (0, extra))

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
        num_places = self.speculative_config.num_speculative_tokens
        batch = max(1, min(self.max_batch_size, num_tokens // num_places))
        ids = torch.zeros(batch, dtype=torch.int64, device=self.device)
        boundary = None
        if self._bound.drafter.config.uses_boundary_hidden:
            boundary = self.hidden_states.new_zeros(batch, self.hidden_size)
        with set_forward_context(None, self.vllm_config, num_tokens=batch * num_places):
            hidden = self._bound.forward(
                ids, block_positions(ids, num_places), boundary
            )
            self._bound.draft(hidden, pick_greedy)
