# SPDX-License-Identifier: Apache-2.0
"""The V2 runner's drafter: vLLM's speculator base class with our forward.

`propose` has four parts. `_lay_out` translates vLLM's batch (`drafter.layout.lay_out`),
`_stage` copies that into buffers of fixed size, `_block_metadata` has vLLM build the
attention metadata over these buffers, and `_generate_draft` reads nothing but them: it
is what a CUDA graph holds, and it runs the same way without one. Nothing waits for the
device, and no shape depends on what is in a tensor.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import (
    build_attn_metadata,
    build_slot_mappings_by_layer,
    init_attn_backend,
)
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CudaGraphManager,
)
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_mtp.drafter.heads import pick_greedy
from vllm_mtp.drafter.layout import (
    PAD_SLOT,
    CacheTable,
    DraftInputs,
    DraftLayout,
    covered_tokens,
    lay_out,
    most_read,
    require_whole_blocks,
)
from vllm_mtp.plugin import METHOD
from vllm_mtp.serving.faults import FILLER_TOKEN, DraftGuard
from vllm_mtp.serving.ledger import install_for_runner
from vllm_mtp.serving.loading import load_bound_drafter, replace_weights
from vllm_mtp.serving.v2_graphs import draft_graphs
from vllm_mtp.serving.worker import DraftWeights

# vLLM's names for the requests of its warm-up, which run like real ones.
_WARMUP_REQUESTS = ("_warmup_", "_v2_mixed_warmup_")


class MTPPlaceholderSpeculator(DraftModelSpeculator):
    """Drafts all tokens of a step in one forward over the target's KV cache."""

    faults: DraftGuard

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        config: Any = self.speculative_config
        install_for_runner(vllm_config)
        config.runner_has_drafter = True
        self.num_query_per_req = num_draft_tokens = self.num_speculative_steps
        # The base class sizes its buffers by the target's token budget; ours may be
        # larger, since the drafter does not take from that budget.
        num_rows = self.max_num_reqs * num_draft_tokens
        self.input_buffers = InputBuffers(self.max_num_reqs, num_rows, device)
        self._starts = (
            torch.arange(self.max_num_reqs + 1, dtype=torch.int32, device=device)
            * num_draft_tokens
        )
        self._columns = torch.arange(num_draft_tokens, device=device)
        self._anchors, self._prefix_lens = torch.zeros(
            2, self.max_num_reqs, dtype=torch.int64, device=device
        )
        self._boundary: torch.Tensor | None = None
        self._rope_state: Any = None  # the runner's, with M-RoPE
        self._rope_positions = self.input_buffers.positions
        self._graphs: CudaGraphManager | None = None
        self.faults = DraftGuard(alone=vllm_config.parallel_config.world_size == 1)

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        """Load the drafter and bind it to the loaded target."""
        self._bound, self._host = load_bound_drafter(
            target_model, self.vllm_config, self.device
        )
        if self._bound.drafter.config.uses_boundary_hidden:
            assert isinstance(self.dtype, torch.dtype), "vLLM resolved it before"
            self._boundary = torch.zeros(
                self.max_num_reqs,
                self.hidden_size,
                dtype=self.dtype,
                device=self.device,
            )
        return DraftWeights(self._bound.weights)

    def replace_weights(self, model: str, revision: str | None) -> Path:
        """Draft with another drafter's weights from now on; see `loading`.

        They go where the former were, which is where CUDA graphs look for them.
        """
        folder = replace_weights(self._bound, self._host, model, revision)
        self.faults.start_over()
        return folder

    def set_attn(
        self,
        model_state: Any,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Build attention metadata of our own over the target's layers."""
        super().set_attn(model_state, kv_cache_config, block_tables, *args, **kwargs)
        rope_state = getattr(model_state, "rope_state", None)
        if rope_state is not None:
            self._rope_state = rope_state
            self._rope_positions = torch.zeros_like(self.input_buffers.positions)
        # Not by the base class, which has no layers of a draft model to build it for:
        # the runner would leave such layers out of the target's own bookkeeping.
        names = self._host.attention_layer_names
        self.attn_groups, self.attn_cg_support, _ = init_attn_backend(
            kv_cache_config, self.vllm_config, self.device, active_layer_names=names
        )
        cache_groups = kv_cache_config.kv_cache_groups
        self._bound_gids = [
            gid
            for gid, group in enumerate(cache_groups)
            if not names.isdisjoint(group.layer_names)
        ]
        self._slots = torch.full(
            (len(cache_groups), self.input_buffers.max_num_tokens),
            PAD_SLOT,
            dtype=torch.int64,
            device=self.device,
        )
        # What `lay_out` will give, for graphs, which are captured before any step.
        self._tables = block_tables
        tables = self._target_tables()
        limit = self.vllm_config.model_config.max_model_len
        self._most_read = covered_tokens(tables, limit)
        self._window = self._bound.drafter.config.prefix_window
        if self._window is not None:
            most = most_read(self._window, self.num_speculative_steps)
            self._most_read = min(self._most_read, most)
            self._read_within_window(tables)

    def _target_tables(self) -> list[CacheTable]:
        """The target's tables ``[max_num_reqs, M]`` of the groups that are read."""
        return [
            CacheTable(
                self._tables.input_block_tables[gid],
                self.kv_cache_config.kv_cache_groups[gid].kv_cache_spec.block_size,
            )
            for gid in self._bound_gids
        ]

    def _read_within_window(self, target_tables: list[CacheTable]) -> None:
        """Take block tables of our own, which `_stage` fills.

        The base class and graphs read no others, and they stay where they are.
        """
        require_whole_blocks(table.block_size for table in target_tables)
        self.block_tables = copy.copy(self._tables)
        ours = list(self._tables.input_block_tables)
        for gid, (table, size) in zip(self._bound_gids, target_tables, strict=True):
            width = min(table.shape[1], -(-self._most_read // size))
            ours[gid] = table.new_zeros(len(table), width)
        self.block_tables.input_block_tables = ours

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
            num_speculative_tokens: 0 skips drafting; otherwise all positions are
                drafted, and the runner drops those that it does not want.
            kwargs: As ``args``.

        Returns:
            ``[B, k]`` int64 token ids, valid until the next call.
        """
        if num_speculative_tokens == 0:
            return self.draft_tokens[: input_batch.num_reqs]
        if self.faults.is_off:
            return self._no_drafts(input_batch)
        num_reqs = input_batch.num_reqs
        request_slots = input_batch.idx_mapping[:num_reqs].long()
        try:
            self._copy_request_inputs(
                num_reqs, request_slots, temperature, seeds, dummy_run=dummy_run
            )
            anchors = torch.where(
                num_sampled[:num_reqs] > 0,
                last_sampled.view(-1)[request_slots],
                next_prefill_tokens.view(-1)[request_slots],
            )
            self._anchors[:num_reqs].copy_(anchors)
            if skip_attn_for_dummy_run:
                self._generate_draft(num_reqs, None, None)
            else:
                self._host.follow_weights()
                layout = self._lay_out(input_batch, num_rejected[:num_reqs])
                self._stage(layout, last_hidden_states, dummy_run)
                self._draft_staged(input_batch)
            return self.draft_tokens[:num_reqs]
        except Exception as error:
            # A drafter that fails at start must not be served.
            if dummy_run or input_batch.req_ids[0].startswith(_WARMUP_REQUESTS):
                raise
            self.faults.survive(error)
            return self._no_drafts(input_batch)

    def _no_drafts(self, input_batch: InputBatch) -> torch.Tensor:
        """Fillers, since this runner always verifies k drafts. ``[B, k]`` int64.

        They are verified, rejected and counted like any other draft. Where drafts are
        sampled, vLLM also reads the distribution that a draft came from: it is all on
        the filler, or the tokens drawn in its place would not be the target's.
        """
        num_reqs = input_batch.num_reqs
        self.draft_tokens[:num_reqs].fill_(FILLER_TOKEN)
        if self.draft_logits is not None:
            certain = self.draft_logits.new_full((self.vocab_size,), -torch.inf)
            certain[FILLER_TOKEN] = 0.0
            self.draft_logits[input_batch.idx_mapping[:num_reqs].long()] = certain
        return self.draft_tokens[:num_reqs]

    def _lay_out(
        self, input_batch: InputBatch, num_rejected: torch.Tensor
    ) -> DraftLayout:
        """vLLM's batch of this step, with a block behind every request's prefix."""
        num_reqs, deltas = input_batch.num_reqs, None
        if self._rope_state is not None:
            # By request slot; another buffer whenever requests have come.
            deltas = self._rope_state.prefill_delta.gpu
            deltas = deltas[input_batch.idx_mapping[:num_reqs]]
        tables = [
            CacheTable(table[:num_reqs], size) for table, size in self._target_tables()
        ]
        return lay_out(
            DraftInputs(
                input_batch.seq_lens[:num_reqs],
                input_batch.query_start_loc[1 : num_reqs + 1],
                num_rejected,
                tables,
                deltas,
            ),
            self.num_speculative_steps,
            # As it is now: vLLM may have lowered it to what the cache holds, while the
            # base class keeps the first one.
            self.vllm_config.model_config.max_model_len,
            self._window,
        )

    def _stage(
        self, layout: DraftLayout, last_hidden_states: torch.Tensor, dummy_run: bool
    ) -> None:
        """Copy the blocks into the buffers; rows behind the batch are padding.

        Args:
            layout: Of B blocks.
            last_hidden_states: As in `propose`.
            dummy_run: Give no slot to any row.
        """
        num_reqs, buffers = len(layout.positions), self.input_buffers
        num_rows = layout.positions.numel()
        self._prefix_lens[:num_reqs].copy_(layout.prefix_lens)
        buffers.positions[:num_rows].copy_(layout.positions.flatten())
        if self._rope_state is not None:
            self._rope_positions[:num_rows].copy_(layout.rope_positions.flatten())
        buffers.seq_lens[:num_reqs].copy_(layout.seq_lens)
        buffers.seq_lens[num_reqs:].zero_()
        torch.clamp(self._starts, max=num_rows, out=buffers.query_start_loc)
        self._slots.fill_(PAD_SLOT)
        for index, gid in enumerate(self._bound_gids):
            if not dummy_run:
                self._slots[gid, :num_rows].copy_(layout.slots[index])
            if self._window is not None:
                ours = self.block_tables.input_block_tables[gid]
                ours[:num_reqs].copy_(layout.read_tables[index])
                ours[num_reqs:] = 0  # as vLLM's own: the null block
        if self._boundary is not None:
            boundary = last_hidden_states[layout.boundary_rows]
            self._boundary[:num_reqs].copy_(boundary)

    def _draft_staged(self, input_batch: InputBatch) -> None:
        """Draft on what is staged: replay a graph, or run what it would hold."""
        num_reqs, num_draft_tokens = input_batch.num_reqs, self.num_speculative_steps
        num_rows = num_reqs * num_draft_tokens
        batch = BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.NONE,
            num_tokens=num_rows,
            num_reqs=num_reqs,
            uniform_token_count=num_draft_tokens,
        )
        if self._graphs is not None:
            batch = self._graphs.dispatch(num_reqs, num_rows, num_draft_tokens, 0)
        # With a graph too: vLLM's builders refresh what the graph reads.
        metadata = self._block_metadata(input_batch, batch)
        if self._graphs is not None and batch.cg_mode == CUDAGraphMode.FULL:
            self._graphs.run_fullgraph(batch)
        else:
            slots_by_layer = build_slot_mappings_by_layer(
                self._slots[:, :num_rows], self.kv_cache_config
            )
            self._generate_draft(num_reqs, metadata, slots_by_layer)

    def _block_metadata(
        self, input_batch: InputBatch, batch: BatchExecutionDescriptor
    ) -> dict[str, Any] | None:
        """The drafter's batch: k query rows behind every request's prefix."""
        num_reqs, num_draft_tokens = input_batch.num_reqs, self.num_speculative_steps
        # As NumPy, since this must stay a tensor of the host.
        upper = input_batch.seq_lens_cpu_upper_bound
        longest = int(upper[:num_reqs].numpy().max())
        self.draft_max_seq_len = min(longest + num_draft_tokens, self._most_read)
        return self._build_attn_metadata(
            num_reqs=num_reqs,
            batch_desc=batch,
            query_start_loc_np=self.arange_np[: num_reqs + 1] * num_draft_tokens,
            # Some backends index the block table by this bound, k added.
            seq_lens_cpu_upper_bound=upper.clamp(
                max=self._most_read - num_draft_tokens
            ),
            step=num_draft_tokens,
            slot_mappings=self._slots[:, : batch.num_tokens],
        )

    def _generate_draft(
        self,
        num_reqs: int,
        metadata: dict[str, Any] | None,
        slots_by_layer: dict[str, torch.Tensor] | None,
    ) -> None:
        """Forward and choice of tokens, from the staged buffers to ``draft_tokens``.

        All that it reads of the step lies in buffers, so it can be captured.

        Args:
            num_reqs: Blocks to run, padding included.
            metadata: The attention metadata by layer; None without a cache.
            slots_by_layer: ``[num_reqs * k]`` each; None without a cache.
        """
        num_rows = num_reqs * self.num_speculative_steps
        positions = self._rope_positions[:num_rows].view(num_reqs, -1)
        with self._host.forward_context(metadata, num_rows, slots_by_layer):
            hidden = self._bound.forward(
                self._anchors[:num_reqs],
                positions,
                None if self._boundary is None else self._boundary[:num_reqs],
            )
        self.draft_tokens[:num_reqs].copy_(self._draft(hidden))

    def _draft(self, hidden: torch.Tensor) -> torch.Tensor:
        """Choose the tokens. ``[B, k]`` int64."""
        cache = self.draft_logits
        estimates = getattr(self, "acceptance_estimator", None) is not None
        if cache is None and not estimates:
            return self._bound.draft(hidden, pick_greedy)[0]
        num_reqs = hidden.shape[0]
        slots = self.idx_mapping[:num_reqs]
        columns = iter(self._columns)

        def pick(logits: torch.Tensor) -> tuple[torch.Tensor, None]:
            """As vLLM's `sample_draft` does, from logits instead of hidden states."""
            column = next(columns)
            if cache is None:
                tokens = pick_greedy(logits)[0]
            else:
                tokens = gumbel_sample(
                    logits.to(cache.dtype),
                    slots,
                    self.temperature,
                    self.seeds,
                    self._prefix_lens[:num_reqs] + column,
                    apply_temperature=True,
                    is_drafting=True,
                    logits_cache=cache,
                    logits_cache_col=column,
                    use_fp64=self.use_fp64_gumbel,
                )
            if estimates:
                self._maybe_predict_acceptance(logits, slots, column)
            return tokens, None

        return self._bound.draft(hidden, pick, whole_vocab=True)[0]

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Prepare the drafter's own graphs, where they are asked for."""
        self._graphs = draft_graphs(
            self.vllm_config, self.device, cudagraph_mode, self.attn_cg_support
        )

    def capture(self, *_: Any, **__: Any) -> None:
        """Capture `_generate_draft` for the batch sizes that vLLM captures."""
        if self._graphs is not None:
            self._graphs.capture(self._to_capture, f"Capturing {METHOD} CUDA graphs")

    def _to_capture(
        self, desc: BatchExecutionDescriptor, warmup: bool
    ) -> Callable[[CUDAGraphMode], None]:
        """Stage a made-up batch that writes nothing; vLLM runs and captures it."""
        num_reqs, num_draft_tokens = desc.num_reqs, self.num_speculative_steps
        assert num_reqs is not None, "graphs of whole batches have a size"
        buffers, slots = self.input_buffers, self._slots[:, : desc.num_tokens]
        self.idx_mapping.fill_(-1)
        self._slots.fill_(PAD_SLOT)
        buffers.query_start_loc.copy_(self._starts)
        buffers.seq_lens.fill_(num_draft_tokens)
        starts = self.arange_np[: num_reqs + 1] * num_draft_tokens
        metadata = build_attn_metadata(
            attn_groups=self.attn_groups,
            num_reqs=num_reqs,
            num_tokens=desc.num_tokens,
            query_start_loc_gpu=buffers.query_start_loc[: num_reqs + 1],
            query_start_loc_cpu=torch.from_numpy(starts),
            max_query_len=num_draft_tokens,
            seq_lens=buffers.seq_lens[:num_reqs],
            max_seq_len=self._most_read,
            block_tables=self.block_tables.get_dummy_block_tables(num_reqs),
            slot_mappings=slots,
            kv_cache_config=self.kv_cache_config,
            for_cudagraph_capture=True,
        )
        slots_by_layer = build_slot_mappings_by_layer(slots, self.kv_cache_config)
        return lambda _: self._generate_draft(num_reqs, metadata, slots_by_layer)
