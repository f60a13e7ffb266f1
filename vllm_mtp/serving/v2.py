# SPDX-License-Identifier: Apache-2.0
"""The V2 runner's drafter: vLLM's speculator base class with our forward.

The step's inputs lie in buffers of fixed size, and nothing waits for the device. The
attention metadata is still built anew in each step, so there is no graph yet.
"""

from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_mtp.block import PAD_SLOT, FittedBlocks, fit_blocks
from vllm_mtp.modeling.heads import pick_greedy
from vllm_mtp.serving.loading import load_bound_drafter


class MTPPlaceholderSpeculator(DraftModelSpeculator):
    """Drafts all tokens of a step in one forward over the target's KV cache."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.num_query_per_req = num_places = self.num_speculative_steps
        # The base class sizes its buffers by the target's token budget; ours may be
        # larger, since the drafter does not take from that budget.
        num_rows = self.max_num_reqs * num_places
        self.input_buffers = InputBuffers(self.max_num_reqs, num_rows, device)
        self._starts = (
            torch.arange(self.max_num_reqs + 1, dtype=torch.int32, device=device)
            * num_places
        )
        self._places = torch.arange(num_places, device=device)
        # Before `set_attn` only the memory profile runs, without a cache.
        self._limit = self._readable_len = vllm_config.model_config.max_model_len

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        """Load the drafter and bind it to the loaded target."""
        self._bound, self._host = load_bound_drafter(
            target_model, self.vllm_config, self.device
        )
        return self._bound.drafter

    def set_attn(
        self,
        model_state: Any,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Build attention metadata of our own over the target's layers."""
        # Only during this call: the runner takes these names for layers of a draft
        # model, which it would leave out of the target's own bookkeeping.
        self.draft_attn_layer_names = self._host.attention_layer_names
        super().set_attn(model_state, kv_cache_config, block_tables, *args, **kwargs)
        self.draft_attn_layer_names = set()
        block_sizes = [
            group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups
        ]
        # Slots below these lie in the null block, which belongs to nobody.
        self._first_slots = torch.tensor(block_sizes, device=self.device)[:, None]
        self._slots = torch.full(
            (len(block_sizes), self.input_buffers.max_num_tokens),
            PAD_SLOT,
            dtype=torch.int64,
            device=self.device,
        )
        # The limit as it is now: vLLM may have lowered it to what the cache holds,
        # while the base class keeps the first one.
        self._limit = self.vllm_config.model_config.max_model_len
        # What the shortest block table covers: whole cache blocks, up to the limit.
        self._readable_len = min(-(-self._limit // s) * s for s in block_sizes)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """The drafter runs without a graph of its own."""

    def capture(self, *_: Any, **__: Any) -> None:
        """Nothing to capture."""

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        *args: Any,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Draft for every request of the batch.

        Args:
            input_batch: The target's batch in this step; B requests.
            attn_metadata: Not used.
            slot_mappings: Not used.
            last_hidden_states: ``[tokens, hidden_size]``, after the final norm.
            aux_hidden_states: Not used.
            num_sampled: ``[B]``; 0 where the prompt goes on.
            num_rejected: ``[B]``; drafts rejected in this step.
            last_sampled: ``[max_num_reqs]``, by request slot.
            next_prefill_tokens: ``[lookahead, max_num_reqs]``; the prompt's next
                tokens, by request slot.
            temperature: ``[max_num_reqs]``, by request slot.
            seeds: ``[max_num_reqs]``, by request slot.
            args: Differ from version to version; not used.
            dummy_run: The batch is made up: nothing may be written.
            skip_attn_for_dummy_run: There is no cache yet.
            num_speculative_tokens: 0 skips drafting; otherwise all places are
                drafted, and the runner drops those that it does not want.
            kwargs: As ``args``.

        Returns:
            ``[B, k]`` int64 token ids, valid until the next call.
        """
        num_reqs = input_batch.num_reqs
        drafted = self.draft_tokens[:num_reqs]
        if num_speculative_tokens == 0:
            return drafted
        slots = input_batch.idx_mapping[:num_reqs].long()
        self._copy_request_inputs(
            num_reqs, slots, temperature, seeds, dummy_run=dummy_run
        )
        anchors = torch.where(
            num_sampled[:num_reqs] > 0,
            last_sampled.view(-1)[slots],
            next_prefill_tokens.view(-1)[slots],
        )
        prefix_lens = input_batch.seq_lens[:num_reqs] - num_rejected[:num_reqs]
        boundary = self._boundary(input_batch, num_rejected, last_hidden_states)
        has_cache = not (dummy_run and skip_attn_for_dummy_run)
        hidden = self._forward(input_batch, anchors, prefix_lens, boundary, has_cache)
        drafted.copy_(self._draft(hidden, prefix_lens))
        return drafted

    def _boundary(
        self,
        input_batch: InputBatch,
        num_rejected: torch.Tensor,
        last_hidden_states: torch.Tensor,
    ) -> torch.Tensor | None:
        """The target's hidden state behind each request's last valid token."""
        if not self._bound.drafter.config.uses_boundary_hidden:
            return None
        num_reqs = input_batch.num_reqs
        ends = input_batch.query_start_loc[1 : num_reqs + 1]
        return last_hidden_states[(ends - num_rejected[:num_reqs] - 1).long()]

    def _forward(
        self,
        input_batch: InputBatch,
        anchors: torch.Tensor,
        prefix_lens: torch.Tensor,
        boundary: torch.Tensor | None,
        has_cache: bool,
    ) -> torch.Tensor:
        """Run the drafter's blocks. ``[B, k, hidden_size]``."""
        blocks = fit_blocks(
            prefix_lens, self.num_speculative_steps, self._limit, self._readable_len
        )
        per_layer, slot_mapping = None, None
        if has_cache:
            slots = self._scratch_slots(blocks)
            per_layer = self._block_metadata(input_batch, blocks, slots)
            slot_mapping = build_slot_mappings_by_layer(slots, self.kv_cache_config)
        with set_forward_context(
            per_layer,
            self.vllm_config,
            num_tokens=blocks.positions.numel(),
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=slot_mapping,
        ):
            return self._bound.forward(anchors, blocks.positions, boundary)

    def _scratch_slots(self, blocks: FittedBlocks) -> torch.Tensor:
        """Slots of every KV-cache group. ``[groups, B * k]`` int64."""
        num_reqs, num_rows = len(blocks.positions), blocks.positions.numel()
        self.input_buffers.positions[:num_rows].copy_(blocks.positions.flatten())
        slots = self.block_tables.compute_slot_mappings(
            self.idx_mapping[:num_reqs],
            self._starts[: num_reqs + 1],
            self.input_buffers.positions[:num_rows],
            num_rows,
            out=self._slots,
        )
        # A row beyond the limit would otherwise hit the last token's slot.
        unusable = blocks.beyond.flatten() | (slots < self._first_slots)
        return slots.masked_fill_(unusable, PAD_SLOT)

    def _block_metadata(
        self, input_batch: InputBatch, blocks: FittedBlocks, slots: torch.Tensor
    ) -> dict[str, Any] | None:
        """The drafter's batch: k query rows behind every request's prefix."""
        num_reqs, num_places = input_batch.num_reqs, self.num_speculative_steps
        buffers = self.input_buffers
        buffers.query_start_loc[: num_reqs + 1].copy_(self._starts[: num_reqs + 1])
        buffers.seq_lens[:num_reqs].copy_(blocks.seq_lens)
        upper = input_batch.seq_lens_cpu_upper_bound[:num_reqs]
        self.draft_max_seq_len = min(int(upper.max()) + num_places, self._readable_len)
        return self._build_attn_metadata(
            num_reqs=num_reqs,
            batch_desc=BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.NONE,
                num_tokens=num_reqs * num_places,
                num_reqs=num_reqs,
                uniform_token_count=num_places,
            ),
            query_start_loc_np=self.arange_np[: num_reqs + 1] * num_places,
            seq_lens_cpu_upper_bound=input_batch.seq_lens_cpu_upper_bound,
            step=num_places,
            slot_mappings=slots,
        )

    def _draft(self, hidden: torch.Tensor, prefix_lens: torch.Tensor) -> torch.Tensor:
        """Choose the tokens. ``[B, k]`` int64."""
        cache = self.draft_logits
        if cache is None:
            return self._bound.draft(hidden, pick_greedy)[0]
        num_reqs = hidden.shape[0]
        columns = iter(self._places)

        def pick(logits: torch.Tensor) -> tuple[torch.Tensor, None]:
            place = next(columns)
            tokens = gumbel_sample(
                logits.to(cache.dtype),
                self.idx_mapping[:num_reqs],
                self.temperature,
                self.seeds,
                prefix_lens.long() + place,
                apply_temperature=True,
                is_drafting=True,
                logits_cache=cache,
                logits_cache_col=place,
                use_fp64=self.use_fp64_gumbel,
            )
            return tokens, None

        return self._bound.draft(hidden, pick, whole_vocab=True)[0]
