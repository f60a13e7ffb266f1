# SPDX-License-Identifier: Apache-2.0
"""The replacements that `ledger.py` puts in place.

Each function takes the original and gives the replacement.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vllm_mtp.errors import MethodConfigError
from vllm_mtp.plugin import METHOD


def create_speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Ledger entry ``config``."""

    @functools.wraps(original)
    def wrapper(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        requested = _requested(self)
        if requested.get("method") != METHOD:
            return original(self, target_model_config, target_parallel_config)
        from vllm_mtp.serving.config import build_config

        return build_config(
            self, requested, target_model_config, target_parallel_config
        )

    return wrapper


def _requested(engine_args: Any) -> dict[str, Any]:
    """The user's speculative settings, from the dict and the short flags."""
    settings = {
        key.replace("-", "_") if isinstance(key, str) else key: value
        for key, value in (engine_args.speculative_config or {}).items()
    }
    for flag, key in (
        ("spec_method", "method"),
        ("spec_model", "model"),
        ("spec_tokens", "num_speculative_tokens"),
    ):
        value = getattr(engine_args, flag, None)
        if value is not None and settings.setdefault(key, value) != value:
            raise MethodConfigError(
                f"--{flag.replace('_', '-')} and speculative_config[{key!r}] differ: "
                f"{value!r} and {settings[key]!r}. Give one of them."
            )
    return settings


def validate_spec_decode(original: Callable[..., None]) -> Callable[..., None]:
    """Ledger entry ``requests``."""

    @functools.wraps(original)
    def wrapper(self: Any, speculative_config: Any) -> None:
        original(self, speculative_config)
        from vllm_mtp.serving.config import MTPPlaceholderSpecConfig

        if isinstance(speculative_config, MTPPlaceholderSpecConfig):
            from vllm_mtp.serving.requests import require_verifiable

            require_verifiable(self, speculative_config)

    return wrapper


def new_draft_model_proposer(original: Callable[..., Any]) -> Any:
    """Ledger entry ``v1-proposer``."""

    def wrapper(cls: type, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.spec_decode.draft_model import DraftModelProposer

        from vllm_mtp.serving.config import is_ours
        from vllm_mtp.serving.v1 import MTPPlaceholderProposer

        vllm_config = kwargs.get("vllm_config", args[0] if args else None)
        if cls is DraftModelProposer and is_ours(vllm_config):
            cls = MTPPlaceholderProposer
        return object.__new__(cls)

    return wrapper


def init_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    """Ledger entry ``v2-speculator``."""

    @functools.wraps(original)
    def wrapper(vllm_config: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_mtp.serving.config import is_ours

        if not is_ours(vllm_config):
            return original(vllm_config, device, *args, **kwargs)
        from vllm_mtp.serving.v2 import MTPPlaceholderSpeculator

        return MTPPlaceholderSpeculator(vllm_config, device)

    return wrapper


def prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Ledger entry ``v2-adapter-rows``."""

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_mtp.serving.config import is_ours

        batch = original(self, *args, **kwargs)
        if self.lora_config and is_ours(self.vllm_config):
            # The runner asks it next, of this batch.
            state, rows = self.lora_state, np.diff(batch.cu_num_logits_np)

            def make_lora_inputs(names: Any, slots: Any, tokens: Any) -> Any:
                of_requests = type(state).make_lora_inputs(state, names, slots, tokens)
                return tuple(state.lora_ids[slots].repeat(rows)), *of_requests[1:]

            state.make_lora_inputs = make_lora_inputs
        return batch

    return wrapper


def take_draft_token_ids(original: Callable[..., Any]) -> Callable[..., Any]:
    """Ledger entry ``v1-late-drafts``."""

    @functools.wraps(original)
    def wrapper(self: Any) -> Any:
        from vllm_mtp.serving.v1 import MTPPlaceholderProposer

        drafter = getattr(self, "drafter", None)
        if isinstance(drafter, MTPPlaceholderProposer):
            late = drafter.late_drafts()
            if late is not None:
                self._draft_token_ids = late
        return original(self)

    return wrapper


def sample_or_verify(original: Callable[..., Any]) -> Callable[..., Any]:
    """Ledger entry ``v1-no-drafts``."""

    @functools.wraps(original)
    def wrapper(
        self: Any,
        metadata: Any,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: Any,
    ) -> Any:
        if metadata.max_spec_len:
            return original(self, metadata, draft_probs, logits, sampling_metadata)
        # As the rejection sampler asks for what it samples itself: without it, vLLM's
        # logits processors would take row 0 for one that verifies a draft.
        return self.sampler(
            logits=logits, sampling_metadata=sampling_metadata, predict_bonus_token=True
        )

    return wrapper


def thinking_budgets(original: Callable[..., Any]) -> Callable[..., Any]:
    """Ledger entry ``v1-thinking``."""

    @functools.wraps(original)
    def wrapper(
        reasoning_config: Any,
        max_num_seqs: int,
        num_spec_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        make = original
        if reasoning_config is not None and num_spec_tokens:
            from vllm_mtp.serving.thinking import ThinkingBudgets

            make = ThinkingBudgets
        return make(reasoning_config, max_num_seqs, num_spec_tokens, *args, **kwargs)

    return wrapper


def apply_sampling_constraints(original: Callable[..., Any]) -> Callable[..., Any]:
    """Ledger entry ``cpu-sampling``."""

    @functools.wraps(original)
    def wrapper(
        logits: torch.Tensor, cu_num_draft_tokens: torch.Tensor, sampling_metadata: Any
    ) -> torch.Tensor:
        if sampling_metadata.all_greedy or not len(logits):
            return logits
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
        from vllm.v1.sample.rejection_sampler import GREEDY_TEMPERATURE

        ends = cu_num_draft_tokens
        counts = torch.diff(ends, prepend=ends.new_zeros(1))

        def per_draft(values: torch.Tensor) -> torch.Tensor:
            return values.repeat_interleave(counts, output_size=len(logits))

        of_requests = sampling_metadata.temperature
        # What is not sampled stays as it is.
        of_requests = of_requests.masked_fill(of_requests == GREEDY_TEMPERATURE, 1)
        logits.div_(per_draft(of_requests)[:, None])
        top_k, top_p = (
            None if values is None else per_draft(values)
            for values in (sampling_metadata.top_k, sampling_metadata.top_p)
        )
        return apply_top_k_top_p(logits, top_k, top_p)

    return wrapper


def spec_forward(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Ledger entry ``cpu-gdn``."""

    @functools.wraps(original)
    def wrapper(
        layer: Any,
        attn_metadata_i: Any,
        mixed_qkv_spec: torch.Tensor,
        b_spec: torch.Tensor,
        a_spec: torch.Tensor,
        conv_buf: torch.Tensor,
        ssm_state: torch.Tensor,
        width: int,
        state_len: int,
    ) -> torch.Tensor:
        count = attn_metadata_i.num_spec_decodes
        slots = attn_metadata_i.spec_state_indices_tensor[:count].long()
        accepted = attn_metadata_i.num_accepted_tokens[:count].long()
        lengths = attn_metadata_i.spec_query_start_loc[: count + 1].long().diff()
        first = slots[:, 0]
        # The state behind the last accepted token becomes that of the first slot, so
        # that the step goes on as behind a step without drafts.
        behind = slots.gather(1, accepted[:, None] - 1)[:, 0]
        ssm_state[first] = ssm_state[behind]
        column = torch.arange(state_len)
        conv_buf[first] = _columns(conv_buf[first], column + accepted[:, None] - 1)
        step = copy.copy(attn_metadata_i)
        step.num_accepted_tokens = torch.ones_like(attn_metadata_i.num_accepted_tokens)
        out = original(
            layer,
            step,
            mixed_qkv_spec,
            b_spec,
            a_spec,
            conv_buf,
            ssm_state,
            width,
            state_len,
        )
        # The step's rows are at the buffer's end, and are looked for behind those that
        # the first one's window reaches back to, where a step with all drafts has them.
        gap = (state_len - width + 2 - lengths)[:, None] * (column >= width - 2)
        conv_buf[first] = _columns(conv_buf[first], column + gap)
        return out

    return wrapper


def _columns(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Some columns ``[B, columns]`` of ``[B, dim, columns]``; what is behind the last
    one does not matter."""
    columns = columns.clamp(max=rows.shape[-1] - 1)
    return rows.gather(-1, columns[:, None].expand_as(rows))
