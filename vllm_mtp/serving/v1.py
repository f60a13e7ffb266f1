# SPDX-License-Identifier: Apache-2.0
"""The V1 runner's drafter: a stock ``DraftModelProposer`` with another forward.

`propose` takes vLLM's batch, `_batch` has it laid out (`drafter.layout.lay_out`), and
`_draft` runs the drafter on it and chooses the tokens. On a CPU, where nothing else
needs the drafts at once, all but the first waits until the engine fetches them
(`late_drafts`). By then it is known which requests go on, and each gets as many drafts
as it asked for and as are worth their time (`draft_length`).
"""

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig, UniformTypeKVCacheSpecs
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.worker.utils import AttentionGroup

from vllm_mtp.drafter.bound import scope
from vllm_mtp.drafter.heads import (
    Pick,
    pick_greedy,
    pick_greedy_with_scores,
    probability_of_best,
)
from vllm_mtp.drafter.layout import (
    CacheTable,
    DraftInputs,
    DraftLayout,
    block_positions,
    lay_out,
    require_whole_blocks,
)
from vllm_mtp.drafter.scopes import DRAFT
from vllm_mtp.plugin import METHOD
from vllm_mtp.serving.draft_length import DraftLength, Outcome
from vllm_mtp.serving.faults import FILLER_TOKEN, DraftGuard
from vllm_mtp.serving.ledger import install_for_runner
from vllm_mtp.serving.loading import load_bound_drafter, replace_weights
from vllm_mtp.serving.lookup import Lookups
from vllm_mtp.serving.refusals import require_bidirectional
from vllm_mtp.serving.requests import MOST_DRAFTS
from vllm_mtp.serving.sampling import with_seeds
from vllm_mtp.serving.settings import require_v2
from vllm_mtp.serving.worker import DraftWeights

logger = logging.getLogger("vllm.mtp_placeholder")


# What vLLM knows of each request beside lengths and tables; no draft on a CPU reads it.
_OF_REQUESTS = {field.name for field in fields(CommonAttentionMetadata)} & {
    "is_prefilling",
    "_seq_lens_cpu",  # to 0.31
    "_num_computed_tokens_cpu",
    "req_idx",
    "rswa_prefix_lens",
    "replayssm_decode_base_cpu",
    "_num_computed_tokens_cache",
    "_token_to_req_indices_cache",
}


class _Step(NamedTuple):
    """What a step of the target leaves to draft from: B requests."""

    anchor_ids: torch.Tensor  # [B] int32
    hidden_states: torch.Tensor  # [tokens, hidden_size], after the final norm
    num_rejected: torch.Tensor | None  # [B] int32
    metadata: CommonAttentionMetadata
    sampling: SamplingMetadata


class _Batch(NamedTuple):
    """What one draft needs: B requests, k tokens each."""

    anchor_ids: torch.Tensor  # [B] int32
    boundary: torch.Tensor | None  # [B, hidden_size]
    layout: DraftLayout
    metadata: CommonAttentionMetadata  # of the target
    sampling: SamplingMetadata


class _NoTokenIds:
    """A request whose prompt came as embeddings."""

    def get_token_id(self, _: int) -> int:
        # Used only while the prompt is unfinished, when drafts are thrown away.
        return 0


class MTPPlaceholderProposer(DraftModelProposer):
    """Drafts all tokens of a step in one forward over the target's KV cache.

    Attributes:
        faults: Lets a draft fail.
        prefix_window: What a draft reads; may be another one from step to step.
        lengths: Chooses how much to draft and to verify; None where the user did.
        skips_finished: Whether to draft nothing where no request goes on.
    """

    faults: DraftGuard
    prefix_window: int | None
    lengths: DraftLength | None
    skips_finished: bool = True

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any):
        super().__init__(vllm_config, device, runner)
        self._runner = runner  # the base class does not keep it
        config: Any = self.speculative_config
        require_v2(config)
        install_for_runner(vllm_config)
        config.runner_has_drafter = True
        most = config.num_speculative_tokens
        self.lengths = DraftLength(most) if config.chooses_length else None
        self._lookups = Lookups()
        self._late: _Step | None = None
        self.faults = DraftGuard(alone=vllm_config.parallel_config.world_size == 1)

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Load the drafter and bind it to the loaded target."""
        self._bound, self._host = load_bound_drafter(
            target_model, self.vllm_config, self.device
        )
        self.model = DraftWeights(self._bound.weights)
        drafter_config = self._bound.drafter.config
        self.prefix_window = drafter_config.prefix_window
        self._reads_boundary = drafter_config.uses_boundary_hidden
        self.supports_mm_inputs = False
        if self.speculative_config.enforce_eager is False:
            logger.warning("%s: CUDA graphs of the drafter need the V2 runner", METHOD)
        # The target's own layers: vLLM then builds the drafter's attention
        # metadata for them, and allocates no cache for the drafter.
        self._draft_attn_layer_names = self._host.attention_layer_names

    def replace_weights(self, model: str, revision: str | None) -> Path:
        """Draft with another drafter's weights from now on; see `loading`."""
        folder = replace_weights(self._bound, self._host, model, revision)
        self.faults.start_over()
        if self.lengths is not None:  # what it knows is about the weights that went
            self.lengths = DraftLength(self.speculative_config.num_speculative_tokens)
        return folder

    def initialize_attn_backend(
        self,
        kv_cache_config: KVCacheConfig,
        kernel_block_sizes: list[int] | None = None,
    ) -> None:
        """Make builders of attention metadata over the target's layers.

        The base class takes all layers for alike: of one KV-cache group, and with the
        first one's window. Here a group of layers has one of each, and one backend.
        """
        names = self._draft_attn_layer_names
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, names)
        found: dict[Any, AttentionGroup] = {}
        for gid, cache_group in enumerate(kv_cache_config.kv_cache_groups):
            spec = cache_group.kv_cache_spec
            for name in sorted(names.intersection(cache_group.layer_names)):
                backend = layers[name].get_attn_backend()
                kind = gid, backend.full_cls_name(), layers[name].sliding_window
                if kind not in found:
                    of_layer = spec
                    if isinstance(spec, UniformTypeKVCacheSpecs):
                        of_layer = spec.kv_cache_specs[name]
                    found[kind] = AttentionGroup(backend, [], of_layer, gid)
                found[kind].layer_names.append(name)
        for group in found.values():
            sizes, gid = kernel_block_sizes or (), group.kv_cache_group_id
            size = sizes[gid] if gid < len(sizes) else None
            group.create_metadata_builders(
                self.vllm_config, self.device, kernel_block_size=size
            )
        self.draft_attn_groups = list(found.values())
        backends = [group.backend for group in self.draft_attn_groups]
        require_bidirectional(self._bound.drafter.config, backends)
        self._table_gids = sorted({g.kv_cache_group_id for g in found.values()})
        groups = kv_cache_config.kv_cache_groups
        # A drafter may read no cache at all.
        self.kv_cache_gid = self._table_gids[0] if found else 0
        self.block_size = groups[self.kv_cache_gid].kv_cache_spec.block_size
        if self.prefix_window is not None:
            require_whole_blocks(
                groups[gid].kv_cache_spec.block_size for gid in self._table_gids
            )

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
    ) -> torch.Tensor | list[list[int]]:
        """Draft for every request of the batch.

        Args:
            num_speculative_tokens: k of this step; 0 skips drafting.
            target_token_ids: Not used.
            target_positions: Not used.
            target_hidden_states: ``[tokens, hidden_size]``, after the final norm.
            next_token_ids: ``[B]`` int32; the anchors.
            token_indices_to_sample: Not used.
            common_attn_metadata: The target's batch in this step.
            sampling_metadata: Temperatures for probabilistic drafts.
            mm_embed_inputs: Not used.
            num_rejected_tokens_gpu: ``[B]`` int32; drafts rejected in this step, None
                where none was verified.
            slot_mappings: Not used.

        Returns:
            ``[B, k]`` int64 token ids; of another width only where `_no_drafts` says
            so. Empty lists where they come later, from `late_drafts`.
        """
        self.num_speculative_tokens = num_speculative_tokens
        self._last_draft_probs = self._late = None
        num_reqs = len(next_token_ids)
        if num_speculative_tokens == 0:
            return next_token_ids.new_empty(num_reqs, 0, dtype=torch.int64)
        if self.faults.is_off:
            return self._no_drafts(num_reqs)
        step = _Step(
            next_token_ids,
            target_hidden_states,
            num_rejected_tokens_gpu,
            common_attn_metadata,
            sampling_metadata,
        )
        if self._may_wait(sampling_metadata):
            self._late = step
            return [[] for _ in range(num_reqs)]
        try:
            return self._draft(self._batch(step, num_speculative_tokens))[0]
        except Exception as error:
            self.faults.survive(error)
            return self._no_drafts(num_reqs)

    @torch.inference_mode()
    def late_drafts(self) -> list[list[int]] | None:
        """The drafts of each request that the last `propose` left for later; else None.

        There are none for a request that does not go on, and for all if the drafter
        fails.
        """
        step, self._late = self._late, None
        if step is None:
            return None
        names: list[str] = self._runner.input_batch.req_ids
        try:
            if self.lengths is not None:
                self.lengths.step_is_over(_now_ms(), self._outcomes(step, names))
            drafts = self._drafts_by_name(step, names)
            if self.lengths is not None:
                self.lengths.draft_is_over(_now_ms(), names)
        except Exception as error:
            self.faults.survive(error)
            drafts = {}
        return [drafts.get(name, []) for name in names]

    def _outcomes(self, step: _Step, names: Sequence[str]) -> dict[str, Outcome]:
        """What was verified, by request."""
        queries: list[int] = step.metadata.query_start_loc_cpu.diff().tolist()
        rejected = [0] * len(names)
        if step.num_rejected is not None:
            rejected = step.num_rejected.tolist()
        return {
            name: Outcome(query - 1, query - 1 - number)
            for name, query, number in zip(names, queries, rejected, strict=True)
        }

    def _drafts_by_name(
        self, step: _Step, names: Sequence[str]
    ) -> dict[str, list[int]]:
        """The drafts of those requests that get any."""
        limits = self._limits(names)
        rows = [row for row, limit in enumerate(limits) if limit]
        num_tokens, drafts = max(limits), {}
        if self.lengths is not None:
            # What a seed promises must not hang on a clock: all that there is.
            seeded = {row for row in rows if row in step.sampling.generators}
            free = [names[row] for row in rows if row not in seeded]
            matches = self._lookups.matches(
                {n: self._text(n) for n in free}, num_tokens
            )
            lengths = {name: match.length for name, match in matches.items()}
            plan = self.lengths.plan(_now_ms(), free, len(names), lengths)
            drafts = {n: matches[n].tokens[:kept] for n, kept in plan.copied.items()}
            wanted = set(plan.drafted)
            rows = [row for row in rows if row in seeded or names[row] in wanted]
            if not seeded:
                num_tokens = min(num_tokens, plan.num_tokens)
        if rows and num_tokens:
            some = None if len(rows) == len(names) else torch.tensor(rows)
            tokens, probabilities = self._draft(self._batch(step, num_tokens, some))
            drafted = [names[row] for row in rows]
            drafts |= zip(drafted, tokens.tolist(), strict=True)
            if self.lengths is not None:
                assert probabilities is not None, "late drafts have them"
                kept = self.lengths.tokens_to_verify(
                    drafted, probabilities.numpy(), len(names)
                )
                for row, length in zip(rows, kept, strict=True):
                    if row not in seeded:
                        del drafts[names[row]][length:]
        return {
            name: drafts[name][:limit]
            for name, limit in zip(names, limits, strict=True)
            if name in drafts
        }

    def _text(self, name: str) -> tuple[Sequence[int], Sequence[int]]:
        """Prompt and answer of a request; of a prompt of embeddings, no tokens."""
        request = self._runner.requests[name]
        return request.prompt_token_ids or (), request.output_token_ids

    def _limits(self, names: Sequence[str]) -> list[int]:
        """Most drafts of each request of the step, whose tokens were added.

        vLLM's scheduler decides which requests go on, and asks for drafts all the same.
        One that seems to have finished and has not is only without drafts for a step.
        """
        most = self.num_speculative_tokens
        # Tokens that a step adds, at most; this step's number may be lower.
        newest = self.speculative_config.num_speculative_tokens + 1
        limits = []
        for name in names:
            request = self._runner.requests.get(name)
            if request is None or not request.output_token_ids:
                limits.append(0)  # its prompt is not read to the end
                continue
            params, output = request.sampling_params, request.output_token_ids
            wanted = (params and params.extra_args or {}).get(MOST_DRAFTS, most)
            limit = min(wanted, most)
            if params and params.min_tokens > len(output):
                # vLLM forbids an end behind the last draft as if none were accepted.
                limit = min(limit, params.min_tokens - len(output) - 1)
            over = self.skips_finished and has_finished(params, output, newest)
            limits.append(0 if over else limit)
        return limits

    def _batch(
        self, step: _Step, num_tokens: int, rows: torch.Tensor | None = None
    ) -> _Batch:
        """A step's requests with a block behind every prefix.

        Args:
            step: The step.
            num_tokens: k.
            rows: ``[B]`` int64; only these of the step's requests. None for all.
        """
        metadata = step.metadata

        def of_rows(values: torch.Tensor) -> torch.Tensor:
            return values if rows is None else values[rows]

        # The metadata holds only the table of group 0 for this kind of drafter.
        tables = [self._runner.input_batch.block_table[gid] for gid in self._table_gids]
        rejected = step.num_rejected
        layout = lay_out(
            DraftInputs(
                of_rows(metadata.seq_lens),
                of_rows(metadata.query_start_loc[1:]),
                None if rejected is None else of_rows(rejected),
                [
                    CacheTable(
                        of_rows(t.get_device_tensor(metadata.num_reqs)), t.block_size
                    )
                    for t in tables
                ],
                self._rope_deltas(rows),
            ),
            num_tokens,
            # vLLM may lower it after start-up, to what the cache holds.
            self.vllm_config.model_config.max_model_len,
            self.prefix_window,
        )
        boundary = None
        if self._reads_boundary:
            boundary = step.hidden_states[layout.boundary_rows]
        if rows is not None:
            upper = metadata.seq_lens_cpu_upper_bound
            metadata = metadata.replace(
                num_reqs=len(rows),
                seq_lens=of_rows(metadata.seq_lens),
                seq_lens_cpu_upper_bound=None if upper is None else of_rows(upper),
                **dict.fromkeys(_OF_REQUESTS),
            )
        return _Batch(
            of_rows(step.anchor_ids),
            boundary,
            layout,
            metadata,
            step.sampling,
        )

    def _rope_deltas(self, rows: torch.Tensor | None) -> torch.Tensor | None:
        """As in `DraftInputs`, of the step's requests or only of ``rows``."""
        if not self.uses_mrope:
            return None
        names = self._runner.input_batch.req_ids
        if rows is not None:
            names = [names[row] for row in rows.tolist()]
        requests = map(self._runner.requests.get, names)
        deltas = torch.tensor(
            [(request and request.mrope_position_delta) or 0 for request in requests],
            pin_memory=self.device.type == "cuda",  # or the copy waits for the device
        )
        return deltas.to(self.device, non_blocking=True)

    def _raise_if_mrope(self) -> None:
        """The base class knows no positions for it; `_rope_deltas` does."""

    def _draft(self, batch: _Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the drafter, and choose the tokens.

        Returns:
            ``[B, k]`` int64, and ``[B, k]`` float32 how likely they are, by the
            drafter, where the length follows from it.
        """
        self._host.follow_weights()
        greedy = self._drafts_are_greedy(batch.sampling)
        wants_scores = greedy and self.lengths is not None
        if greedy:
            pick: Pick = pick_greedy_with_scores if wants_scores else pick_greedy
        else:
            pick = self._sampler(batch)
        with scope(DRAFT):
            tokens, kept = self._bound.propose(
                batch.anchor_ids,
                batch.layout.rope_positions,
                batch.boundary,
                pick,
                step=partial(self._context, batch),
                whole_vocab=not greedy,
            )
        if wants_scores:
            assert kept is not None, "the sampler keeps them"
            return tokens, probability_of_best(kept)
        self._last_draft_probs = None if kept is None else kept.contiguous()
        return tokens, None

    def _sampler(self, batch: _Batch) -> Pick:
        """Draws tokens as vLLM does, and keeps the distributions."""

        def pick(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            return self._sample_from_logits(logits.float(), batch.sampling)

        if not batch.sampling.generators:
            return pick
        starts = batch.layout.positions[:, 0]
        return with_seeds(pick, batch.sampling.generators, starts)

    def _context(self, batch: _Batch, position: int) -> AbstractContextManager[object]:
        """What the forward runs in that begins at a position of the blocks."""
        config, layout = self._bound.drafter.config, batch.layout
        # A row of each chain, or whole blocks.
        rows = slice(None) if config.chain is None else slice(position, position + 1)
        causal = config.block_mask == "causal"
        common = _metadata_of(layout, batch.metadata, rows, causal)
        metadata_of_layer: dict[str, object] = {}
        slots_of_layer: dict[str, torch.Tensor] = {}
        for group in self.draft_attn_groups:
            table = self._table_gids.index(group.kv_cache_group_id)
            slots = layout.slots[table].view_as(layout.positions)
            slots = slots[:, rows].contiguous().flatten()  # kernels ask for no strides
            metadata = common.replace(
                block_table_tensor=layout.read_tables[table], slot_mapping=slots
            )
            # Before 0.32 there is no such method, and block tables are the kernel's.
            build = getattr(group, "build_metadata_for_drafting", None)
            build = build or group.get_metadata_builder().build_for_drafting
            built = build(metadata, position)
            metadata_of_layer |= dict.fromkeys(group.layer_names, built)
            slots_of_layer |= dict.fromkeys(group.layer_names, slots)
        return self._host.forward_context(
            metadata_of_layer, common.num_actual_tokens, slots_of_layer
        )

    def _drafts_are_greedy(self, sampling: SamplingMetadata) -> bool:
        probabilistic = self._enable_probabilistic_draft_probs
        return not probabilistic or bool(sampling.all_greedy)

    def _may_wait(self, sampling: SamplingMetadata) -> bool:
        """Whether the drafts can be computed when the scheduler asks for them.

        Not scheduled ahead, nothing else reads them and nothing changes until then;
        but probabilities are taken at once, and of several processes not all are
        asked. A GPU works on drafts beside the host anyway.
        """
        return (
            self.device.type == "cpu"
            and not self.vllm_config.scheduler_config.async_scheduling
            and self.vllm_config.parallel_config.world_size == 1
            and self._drafts_are_greedy(sampling)
        )

    def _no_drafts(self, num_reqs: int) -> torch.Tensor:
        """What says that nothing was drafted, where k drafts were wanted.

        ``[B, 0]`` int64: the scheduler then plans no drafts. Scheduled ahead, it has
        already planned k of them, and the runner reads as many. So they are fillers,
        ``[B, k]`` int64, without probabilities: vLLM takes such drafts for certain
        choices, and verifies, rejects and counts them like any other.
        """
        ahead = self.vllm_config.scheduler_config.async_scheduling
        width = self.num_speculative_tokens if ahead else 0
        size = (num_reqs, width)
        return torch.full(size, FILLER_TOKEN, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def dummy_run(self, num_tokens: int, *_: Any, **__: Any) -> None:
        """Run once without a cache, so that vLLM's memory profile sees the drafter."""
        # As many rows as a step can have, also where the budget of tokens is less.
        num_draft_tokens = self.speculative_config.num_speculative_tokens
        batch = self.max_batch_size
        ids = torch.zeros(batch, dtype=torch.int64, device=self.device)
        boundary = None
        if self._reads_boundary:
            boundary = self.hidden_states.new_zeros(batch, self.hidden_size)
        # What takes most memory of all ways to choose.
        chosen = self._bound.propose(
            ids,
            block_positions(ids, num_draft_tokens),
            boundary,
            pick_greedy_with_scores,
            step=lambda _: self._host.forward_context(
                None, batch * num_draft_tokens, None
            ),
        )[1]
        assert chosen is not None, "the sampler keeps them"
        probability_of_best(chosen)


def _now_ms() -> float:
    return time.perf_counter() * 1e3


def has_finished(params: Any, output_token_ids: Sequence[int], newest: int) -> bool:
    """Whether a token or the number of tokens ends a request.

    Args:
        params: Its ``SamplingParams``; None for a pooling request, which has no end.
        output_token_ids: Its answer, this step's tokens included.
        newest: Most tokens that a step adds.
    """
    if params is None:
        return False
    if params.max_tokens is not None and len(output_token_ids) >= params.max_tokens:
        return True
    # The second holds the model's end token as well, and those of the request.
    stops = params.stop_token_ids if params.ignore_eos else params.all_stop_token_ids
    return not set(stops or ()).isdisjoint(output_token_ids[-newest:])


def _metadata_of(
    layout: DraftLayout,
    metadata: CommonAttentionMetadata,
    rows: slice,
    causal: bool,
) -> CommonAttentionMetadata:
    """The drafter's batch: some rows of each block behind every request's prefix.

    Block table and slots are still the target's.
    """
    batch, num_draft_tokens = layout.positions.shape
    positions = layout.positions[:, rows]
    per_block, device = positions.shape[1], positions.device
    num_rows = batch * per_block

    def starts(where: torch.device | str) -> torch.Tensor:
        # Made where it is wanted: a copy would make the host wait.
        return torch.arange(0, num_rows + 1, per_block, dtype=torch.int32, device=where)

    read = layout.seq_lens[:, rows][:, -1]
    upper = metadata.seq_lens_cpu_upper_bound
    if upper is not None:
        # Some backends index the block table by this bound.
        upper = (upper + num_draft_tokens).clamp(max=layout.most_read)
    return metadata.replace(
        query_start_loc=starts(device),
        query_start_loc_cpu=starts("cpu"),
        seq_lens=read.contiguous().to(metadata.seq_lens.dtype),
        seq_lens_cpu_upper_bound=upper,
        num_actual_tokens=num_rows,
        max_query_len=per_block,
        max_seq_len=min(metadata.max_seq_len + num_draft_tokens, layout.most_read),
        positions=positions.contiguous().flatten(),
        causal=causal,
        # Ranges of images in the prompt, in which attention is not causal, by their
        # positions in the whole sequence. The block lies in none.
        mm_req_doc_ranges=None,
    )
