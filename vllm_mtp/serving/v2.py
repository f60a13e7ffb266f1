# SPDX-License-Identifier: Apache-2.0
"""The V2 runner's drafter: vLLM's speculator base class with our forward.

`propose` has four parts. `_lay_out` translates vLLM's batch (`drafter.layout.lay_out`),
`_stage` copies that into buffers of fixed size, `_attention` has vLLM build the
attention metadata over these buffers, and `_generate_draft` reads nothing but them: it
is what a CUDA graph holds, and it runs the same way without one. Nothing waits for the
device, and no shape depends on what is in a tensor.

A block of k rows runs in one forward. A chain's rows run one after the other, in k
forwards of one row for each request. All forwards of a step are staged beforehand, and
one graph holds them all. See `v2_buffers` for the letters F and R.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

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
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.heads import Pick, pick_greedy
from vllm_mtp.drafter.layout import (
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
from vllm_mtp.serving.refusals import require_bidirectional
from vllm_mtp.serving.v2_buffers import DraftBuffers
from vllm_mtp.serving.v2_graphs import draft_graphs
from vllm_mtp.serving.worker import DraftWeights

# vLLM's names for the requests of its warm-up, which run like real ones.
_WARMUP_REQUESTS = ("_warmup_", "_v2_mixed_warmup_")


class _Attention(NamedTuple):
    """What the attention of one forward goes by; both are None without a cache."""

    metadata: dict[str, Any] | None  # by layer
    slots: dict[str, torch.Tensor] | None  # by layer, [rows] int64


class MTPPlaceholderSpeculator(DraftModelSpeculator):
    """Drafts all tokens of a step over the target's KV cache, at once or in a chain."""

    faults: DraftGuard

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        config: Any = self.speculative_config
        install_for_runner(vllm_config)
        config.runner_has_drafter = True
        self.num_query_per_req = num_draft_tokens = self.num_speculative_steps
        self._columns = torch.arange(num_draft_tokens, device=device)
        self._anchors, self._prefix_lens = torch.zeros(
            2, self.max_num_reqs, dtype=torch.int64, device=device
        )
        self._boundary: torch.Tensor | None = None
        self._rope_state: Any = None  # the runner's, with M-RoPE
        self._graphs: CudaGraphManager | None = None
        self.faults = DraftGuard(alone=vllm_config.parallel_config.world_size == 1)

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        """Load the drafter and bind it to the loaded target."""
        self._bound, self._host = load_bound_drafter(
            target_model, self.vllm_config, self.device
        )
        self._buffers = self._new_buffers(num_groups=0)
        if self._config.uses_boundary_hidden:
            assert isinstance(self.dtype, torch.dtype), "vLLM resolved it before"
            self._boundary = torch.zeros(
                self.max_num_reqs,
                self.hidden_size,
                dtype=self.dtype,
                device=self.device,
            )
        return DraftWeights(self._bound.weights)

    @property
    def _config(self) -> DrafterConfig:
        return self._bound.drafter.config

    def _new_buffers(self, num_groups: int) -> DraftBuffers:
        num_draft_tokens = self.num_speculative_steps
        forwards = 1 if self._config.chain is None else num_draft_tokens
        return DraftBuffers(
            forwards,
            num_draft_tokens // forwards,
            num_groups,
            self.max_num_reqs,
            self.device,
            has_rope_deltas=self._rope_state is not None,
        )

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
        self._rope_state = getattr(model_state, "rope_state", None)
        # Not by the base class, which has no layers of a draft model to build it for:
        # the runner would leave such layers out of the target's own bookkeeping.
        names = self._host.attention_layer_names
        self.attn_groups, self.attn_cg_support, block_sizes = init_attn_backend(
            kv_cache_config,
            self.attn_vllm_config,
            self.device,
            active_layer_names=names,
        )
        backends = [group.backend for groups in self.attn_groups for group in groups]
        require_bidirectional(self._config, backends)
        self._build_for_each_forward(block_sizes)
        cache_groups = kv_cache_config.kv_cache_groups
        self._bound_gids = [
            gid
            for gid, group in enumerate(cache_groups)
            if not names.isdisjoint(group.layer_names)
        ]
        self._buffers = self._new_buffers(len(cache_groups))
        # What `lay_out` will give, for graphs, which are captured before any step.
        self._tables = block_tables
        tables = self._target_tables()
        limit = self.vllm_config.model_config.max_model_len
        self._most_read = covered_tokens(tables, limit)
        self._window = self._config.prefix_window
        if self._window is not None:
            most = most_read(self._window, self.num_speculative_steps)
            self._most_read = min(self._most_read, most)
            self._read_within_window(tables)

    @property
    def attn_vllm_config(self) -> VllmConfig:
        """The target's config; where rows of a block read those behind them, as vLLM's
        DFlash has it, by which some builders choose what they can capture."""
        if self._config.block_mask == "causal":
            return self.vllm_config
        config = copy.copy(self.vllm_config)
        config.attention_config = replace(config.attention_config, use_non_causal=True)
        return config

    def _build_for_each_forward(self, block_sizes: list[int]) -> None:
        """Give each forward of a chain a metadata builder of its own.

        Some builders keep what they build in buffers of their own, for graphs, and the
        metadata of all forwards must hold until the last one. For microbatches vLLM
        has the same need, and does the same (`init_attn_backend`).
        """
        if self._buffers.num_forwards == 1:
            return
        for gid, groups in enumerate(self.attn_groups):
            size = block_sizes[gid] if gid < len(block_sizes) else None
            for group in groups:
                first: Any = group.get_metadata_builder()
                group.create_metadata_builders(
                    self.attn_vllm_config,
                    self.device,
                    kernel_block_size=size,
                    num_metadata_builders=self._buffers.num_forwards,
                )
                if hasattr(first, "_get_workspace_buffer"):
                    workspace = first._get_workspace_buffer()
                    builders: list[Any] = group.metadata_builders
                    for builder in builders:
                        builder.set_workspace_buffer(workspace)

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
                nothing = _Attention(None, None)
                self._generate_draft(num_reqs, [nothing] * self._buffers.num_forwards)
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
        num_reqs = len(layout.positions)
        self._prefix_lens[:num_reqs].copy_(layout.prefix_lens)
        self._buffers.fill(layout, self._bound_gids, write=not dummy_run)
        if self._window is not None:
            for gid, table in zip(self._bound_gids, layout.read_tables, strict=True):
                ours = self.block_tables.input_block_tables[gid]
                ours[:num_reqs].copy_(table)
                ours[num_reqs:] = 0  # as vLLM's own: the null block
        if self._boundary is not None:
            boundary = last_hidden_states[layout.boundary_rows]
            self._boundary[:num_reqs].copy_(boundary)

    def _draft_staged(self, input_batch: InputBatch) -> None:
        """Draft on what is staged: replay a graph, or run what it would hold."""
        num_reqs, rows = input_batch.num_reqs, self._buffers.num_rows
        batch = BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.NONE,
            num_tokens=num_reqs * rows,
            num_reqs=num_reqs,
            uniform_token_count=rows,
        )
        if self._graphs is not None:
            batch = self._graphs.dispatch(num_reqs, batch.num_tokens, rows, 0)
        # With a graph too: vLLM's builders refresh what the graph reads.
        attention = self._attention(
            batch, num_reqs, input_batch.seq_lens_cpu_upper_bound
        )
        if self._graphs is not None and batch.cg_mode == CUDAGraphMode.FULL:
            self._graphs.run_fullgraph(batch)
        else:
            self._generate_draft(num_reqs, attention)

    def _attention(
        self,
        batch: BatchExecutionDescriptor,
        num_reqs: int,
        upper: torch.Tensor | None,
    ) -> list[_Attention]:
        """What the attention of each forward goes by, over the staged buffers.

        Args:
            batch: Its size with padding.
            num_reqs: Without.
            upper: ``[num_reqs]`` on the host, no less than the prefixes' lengths; None
                to capture.
        """
        buffers, padded = self._buffers, batch.num_reqs
        assert padded is not None, "batches of blocks have a size"
        starts = torch.arange(padded + 1, dtype=torch.int32).clamp_(max=num_reqs)
        longest = self._most_read
        if upper is not None:
            # As NumPy, since it must stay a tensor of the host.
            longest = int(upper[:num_reqs].numpy().max())
        tables = [table[:padded] for table in self.block_tables.input_block_tables]
        found = []
        for forward in range(buffers.num_forwards):
            behind = (forward + 1) * buffers.num_rows
            limits = None
            if upper is not None:
                # Some backends index the block table by these.
                limits = torch.zeros(padded, dtype=torch.int32)
                limits[:num_reqs] = upper[:num_reqs] + behind
                limits.clamp_(max=self._most_read)
            slots = buffers.slots[forward, :, : batch.num_tokens]
            metadata = build_attn_metadata(
                attn_groups=self.attn_groups,
                num_reqs=padded,
                num_tokens=batch.num_tokens,
                query_start_loc_gpu=buffers.starts[: padded + 1],
                query_start_loc_cpu=starts * buffers.num_rows,
                max_query_len=buffers.num_rows,
                seq_lens=buffers.seq_lens[forward, :padded],
                max_seq_len=min(longest + behind, self._most_read),
                block_tables=tables,
                slot_mappings=slots,
                kv_cache_config=self.kv_cache_config,
                seq_lens_cpu_upper_bound=limits,
                positions=buffers.positions[forward, : batch.num_tokens],
                is_prefilling=self.draft_is_prefilling[:padded],
                for_cudagraph_capture=upper is None,
                causal=self._config.block_mask == "causal",
                ubatch_idx=forward,
            )
            by_layer = build_slot_mappings_by_layer(slots, self.kv_cache_config)
            found.append(_Attention(metadata, by_layer))
        return found

    def _generate_draft(self, num_reqs: int, attention: list[_Attention]) -> None:
        """Forwards and choice of tokens, from the staged buffers to ``draft_tokens``.

        All that it reads of the step lies in buffers, so it can be captured.

        Args:
            num_reqs: Blocks to run, padding included.
            attention: Of each forward.
        """

        def step(forward: int) -> AbstractContextManager[None]:
            metadata, slots = attention[forward]
            num_rows = num_reqs * self._buffers.num_rows
            return self._host.forward_context(metadata, num_rows, slots)

        pick, whole_vocab = self._pick(num_reqs)
        tokens, _ = self._bound.propose(
            self._anchors[:num_reqs],
            self._buffers.block_positions(num_reqs),
            None if self._boundary is None else self._boundary[:num_reqs],
            pick,
            step=step,
            whole_vocab=whole_vocab,
        )
        self.draft_tokens[:num_reqs].copy_(tokens)

    def _pick(self, num_reqs: int) -> tuple[Pick, bool]:
        """What chooses the tokens, position by position, and whether it must see logits
        over the whole vocabulary."""
        cache = self.draft_logits
        estimates = getattr(self, "acceptance_estimator", None) is not None
        if cache is None and not estimates:
            return pick_greedy, False
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

        return pick, True

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Prepare the drafter's own graphs, where they are asked for."""
        self._graphs = draft_graphs(
            self.vllm_config,
            self.device,
            cudagraph_mode,
            self.attn_cg_support,
            self._buffers.num_rows,
        )

    def capture(self, *_: Any, **__: Any) -> None:
        """Capture `_generate_draft` for the batch sizes that vLLM captures."""
        if self._graphs is not None:
            self._graphs.capture(self._to_capture, f"Capturing {METHOD} CUDA graphs")

    def _to_capture(
        self, desc: BatchExecutionDescriptor, warmup: bool
    ) -> Callable[[CUDAGraphMode], None]:
        """Stage a made-up batch that writes nothing; vLLM runs and captures it."""
        num_reqs = desc.num_reqs
        assert num_reqs is not None, "graphs of whole batches have a size"
        self.idx_mapping.fill_(-1)
        self._buffers.fill_for_capture()
        self.block_tables.get_dummy_block_tables(num_reqs)  # which clears them
        attention = self._attention(desc, num_reqs, None)
        return lambda _: self._generate_draft(num_reqs, attention)
