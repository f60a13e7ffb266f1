# SPDX-License-Identifier: Apache-2.0
"""The V1 drafter's batches: one block of query rows behind each request's prefix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from vllm.config import CUDAGraphMode, VllmConfig, get_layers_from_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_mtp.drafter.layout import (
    PAD_SLOT,
    FittedBlocks,
    fit_blocks,
    most_read,
    require_whole_blocks,
    slots_of_positions,
    table_without,
)
from vllm_mtp.drafter.model import BoundDrafter


class AlikeLayers(NamedTuple):
    """Bound layers that share a block table, a window and attention metadata."""

    kv_cache_gid: int
    block_size: int  # tokens per entry of the block table
    layer_names: set[str]
    attention_groups: list[Any]  # vLLM's ``AttentionGroup``


class Blocks(NamedTuple):
    """One block per request of the batch."""

    anchor_ids: torch.Tensor  # [B] int32
    fitted: FittedBlocks
    boundary: torch.Tensor | None  # [B, hidden_size]
    tables: list[torch.Tensor]  # by kind of layer, [B, M] int32
    read_tables: list[torch.Tensor]  # likewise, without what a window leaves out
    metadata: CommonAttentionMetadata  # but for block table and slots


LayerMetadata = Callable[[AlikeLayers, CommonAttentionMetadata], dict[str, object]]
"""Gives the attention metadata by layer name."""


def split_by_kind(
    layer_names: set[str], vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> list[set[str]]:
    """Part the layers by KV-cache group and sliding window.

    One group may hold several windows (``--disable-hybrid-kv-cache-manager``).
    """
    layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
    kinds: dict[tuple[int, int | None], set[str]] = {}
    for gid, group in enumerate(kv_cache_config.kv_cache_groups):
        for name in sorted(layer_names.intersection(group.layer_names)):
            kinds.setdefault((gid, layers[name].sliding_window), set()).add(name)
    return list(kinds.values())


class BlockRunner:
    """Makes the drafter's batch of a step from the target's, and runs it.

    Args:
        bound: The drafter on its target.
        alike: All bound layers.
        vllm_config: The engine's.
        runner: vLLM's ``GPUModelRunner``, which has the block tables.

    Attributes:
        prefix_window: What a draft reads; may be another one from step to step.
    """

    def __init__(
        self,
        bound: BoundDrafter,
        alike: list[AlikeLayers],
        vllm_config: VllmConfig,
        runner: Any,
    ) -> None:
        self._bound = bound
        self.prefix_window = bound.drafter.config.prefix_window
        if self.prefix_window is not None:
            require_whole_blocks(kind.block_size for kind in alike)
        self._alike = alike
        self._vllm_config = vllm_config
        self._runner = runner

    def blocks(
        self,
        num_draft_tokens: int,
        anchor_ids: torch.Tensor,
        target_hidden_states: torch.Tensor,
        last_rows: torch.Tensor | None,
        num_rejected: torch.Tensor | None,
        metadata: CommonAttentionMetadata,
    ) -> Blocks:
        """What to draft from.

        Args:
            num_draft_tokens: k of this step.
            anchor_ids: ``[B]`` int32.
            target_hidden_states: ``[tokens, hidden_size]``.
            last_rows: ``[B]`` int32; row of each request's last valid token, None
                where all tokens are valid.
            num_rejected: ``[B]`` int32; None where no drafts were verified.
            metadata: The target's batch in this step.
        """
        prefix_lens = metadata.seq_lens
        if num_rejected is not None:
            prefix_lens = prefix_lens - num_rejected
        boundary = None
        if self._bound.drafter.config.uses_boundary_hidden:
            ends = metadata.query_start_loc[1:] - 1
            boundary = target_hidden_states[ends if last_rows is None else last_rows]
        tables = [self._block_table(alike, metadata) for alike in self._alike]
        # All layers see the same positions: what the shortest table covers.
        readable_len = min(
            table.shape[1] * alike.block_size
            for alike, table in zip(self._alike, tables, strict=True)
        )
        # vLLM may lower the first limit after start-up, to what the cache holds.
        max_model_len = self._vllm_config.model_config.max_model_len
        fitted = fit_blocks(
            prefix_lens,
            num_draft_tokens,
            max_model_len,
            readable_len,
            self.prefix_window,
        )
        if self.prefix_window is not None:
            readable_len = min(
                readable_len, most_read(self.prefix_window, num_draft_tokens)
            )
        read_tables = tables
        if fitted.skipped is not None:
            read_tables = [
                table_without(table, fitted.skipped, alike.block_size, readable_len)
                for alike, table in zip(self._alike, tables, strict=True)
            ]
        batch = _block_metadata(fitted, readable_len, metadata)
        return Blocks(anchor_ids, fitted, boundary, tables, read_tables, batch)

    def forward(self, blocks: Blocks, layer_metadata: LayerMetadata) -> torch.Tensor:
        """Run the drafter on the blocks. ``[B, k, hidden_size]``."""
        positions, beyond = blocks.fitted.positions, blocks.fitted.beyond
        per_layer: dict[str, object] = {}
        slot_mapping: dict[str, torch.Tensor] = {}
        kinds = zip(self._alike, blocks.tables, blocks.read_tables, strict=True)
        for alike, table, read_table in kinds:
            slots = slots_of_positions(positions, table, alike.block_size)
            slots = slots.masked_fill(beyond, PAD_SLOT).flatten()
            slot_mapping |= dict.fromkeys(alike.layer_names, slots)
            of_kind = blocks.metadata.replace(
                block_table_tensor=read_table, slot_mapping=slots
            )
            per_layer |= layer_metadata(alike, of_kind)
        with set_forward_context(
            per_layer,
            self._vllm_config,
            num_tokens=positions.numel(),
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=slot_mapping,
        ):
            return self._bound.forward(blocks.anchor_ids, positions, blocks.boundary)

    def _block_table(
        self, alike: AlikeLayers, metadata: CommonAttentionMetadata
    ) -> torch.Tensor:
        """The layers' block table. ``[B, M]`` int32."""
        # The metadata holds only the table of group 0 for this kind of drafter.
        tables = self._runner.input_batch.block_table
        return tables[alike.kv_cache_gid].get_device_tensor(metadata.num_reqs)


def _block_metadata(
    blocks: FittedBlocks, readable_len: int, metadata: CommonAttentionMetadata
) -> CommonAttentionMetadata:
    """The drafter's batch: k query rows behind every request's prefix.

    Block table and slots are still the target's.
    """
    batch, num_draft_tokens = blocks.positions.shape
    rows = batch * num_draft_tokens
    starts = torch.arange(0, rows + 1, num_draft_tokens, dtype=torch.int32)
    upper = metadata.seq_lens_cpu_upper_bound
    if upper is not None:
        # Some backends index the block table by this bound.
        upper = (upper + num_draft_tokens).clamp(max=readable_len)
    return metadata.replace(
        query_start_loc=torch.arange(
            0,
            rows + 1,
            num_draft_tokens,
            dtype=torch.int32,
            device=blocks.positions.device,
        ),
        query_start_loc_cpu=starts,
        seq_lens=blocks.seq_lens.to(metadata.seq_lens.dtype),
        seq_lens_cpu_upper_bound=upper,
        num_actual_tokens=rows,
        max_query_len=num_draft_tokens,
        max_seq_len=min(metadata.max_seq_len + num_draft_tokens, readable_len),
        positions=blocks.positions.flatten(),
        causal=True,
        # Ranges of images in the prompt, in which attention is not causal, by their
        # positions in the whole sequence. The block lies in none.
        mm_req_doc_ranges=None,
    )
