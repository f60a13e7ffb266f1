# SPDX-License-Identifier: Apache-2.0
"""When the V2 runner's drafter gets CUDA graphs of its own."""

import logging
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from vllm_mtp.plugin import METHOD

logger = logging.getLogger("vllm.mtp_placeholder")


def draft_graphs(
    vllm_config: VllmConfig,
    device: torch.device,
    cudagraph_mode: CUDAGraphMode,
    attention_support: Any,
    num_rows: int,
) -> CudaGraphManager | None:
    """vLLM's manager for graphs over some rows per request, or None for no graphs.

    Off unless ``speculative_config`` says ``"enforce_eager": false``: no GPU has run
    them yet.

    Args:
        vllm_config: Its ``speculative_config`` is ours.
        device: Where the target is.
        cudagraph_mode: What vLLM captures of the target.
        attention_support: The drafter's ``AttentionCGSupportInfo``.
        num_rows: Rows of each request in one forward.
    """
    spec_config = vllm_config.speculative_config
    assert spec_config is not None
    if spec_config.enforce_eager is not False:
        return None
    if reason := _reason_against(cudagraph_mode, attention_support, num_rows):
        logger.warning("%s: drafting without CUDA graphs: %s", METHOD, reason)
        return None
    return CudaGraphManager(
        vllm_config,
        device,
        CUDAGraphMode.FULL_DECODE_ONLY,
        decode_query_len=num_rows,
    )


def _reason_against(
    cudagraph_mode: CUDAGraphMode, support: Any, num_rows: int
) -> str | None:
    if cudagraph_mode.decode_mode() != CUDAGraphMode.FULL:
        return f"vLLM's cudagraph_mode is {cudagraph_mode.name}, which captures none"
    least = AttentionCGSupport.UNIFORM_BATCH
    if num_rows == 1:
        least = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    if support.min_cg_support.value < least.value:
        return f"{support.min_cg_attn_backend} cannot be captured for them"
    return None
