# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs on a CPU: what is captured is run again, with the objects it had then.

A graph knows addresses and shapes only. So whatever the drafter would read anew in
Python is out of date here, as it would be there, and only what lies in buffers counts.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.attn_utils import AttentionCGSupportInfo
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from vllm_mtp.serving import v2

# What the drafter gives to the attention; on a GPU a graph keeps their addresses.
_OURS = ("query_start_loc", "seq_lens", "block_table", "slot_mapping")


class _Graph:
    """What is captured of one batch size: `v2.MTPPlaceholderSpeculator._attention` gave
    ``attention`` to it, and gives ``fresh`` in each step."""

    def __init__(self, run: Callable[[CUDAGraphMode], None], attention: Any) -> None:
        self.run = run
        self.attention = attention
        self.fresh: Any = None

    def replay(self) -> None:
        for captured, fresh in zip(self.attention, self.fresh, strict=True):
            assert captured.metadata.keys() == fresh.metadata.keys()
            for layer, metadata in captured.metadata.items():
                new = fresh.metadata[layer]
                for name in _OURS:
                    assert _is_same(getattr(metadata, name), getattr(new, name)), name
                assert _is_same(captured.slots[layer], fresh.slots[layer])
                assert metadata.causal == new.causal
                # The CPU's backend makes a new schedule for each step, where those that
                # can be captured write into a buffer.
                metadata.scheduler_metadata = new.scheduler_metadata
        self.run(CUDAGraphMode.NONE)


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.data_ptr(), one.shape) == (other.data_ptr(), other.shape)


def play_graphs(
    speculator: Any, num_reqs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, int]]:
    """Let the speculator of a running engine draft with "graphs".

    Args:
        speculator: Its config asks for graphs.
        num_reqs: Batch sizes to capture.
        monkeypatch: Undoes the changes to vLLM.

    Returns:
        Requests in the batch and in the graph, of each step from now on.
    """
    given: list[Any] = []
    played: list[tuple[int, int]] = []

    def built_as_usual(**kwargs: Any) -> Any:
        kwargs["for_cudagraph_capture"] = False  # the CPU's backend cannot
        return build(**kwargs)

    def watched(batch: Any, num_reqs: int, upper: Any) -> Any:
        given.append(attention(batch, num_reqs, upper))
        if upper is not None:  # a step, and no capture
            assert batch.cg_mode == CUDAGraphMode.FULL
            speculator._graphs.graphs[batch].fresh = given[-1]
            played.append((num_reqs, batch.num_reqs))
        return given[-1]

    def capture(manager: Any, create_forward: Any, description: str) -> None:
        for batch in manager._capture_descs[CUDAGraphMode.FULL]:
            create_forward(batch, warmup=True)(CUDAGraphMode.NONE)
            run = create_forward(batch, warmup=False)
            run(CUDAGraphMode.NONE)
            manager.graphs[batch] = _Graph(run, given[-1])
        manager._graphs_captured = True

    build, attention = v2.build_attn_metadata, speculator._attention
    monkeypatch.setattr(v2, "build_attn_metadata", built_as_usual)
    monkeypatch.setattr(CudaGraphManager, "capture", capture)
    monkeypatch.setattr(type(current_platform), "_global_graph_pool", (0, 0))
    monkeypatch.setattr(speculator, "_attention", watched)
    compilation = speculator.vllm_config.compilation_config
    sizes = [number * speculator._buffers.num_rows for number in num_reqs]
    compilation.cudagraph_capture_sizes = sizes
    compilation.max_cudagraph_capture_size = max(sizes)
    speculator.attn_cg_support = AttentionCGSupportInfo()
    speculator.init_cudagraph_manager(CUDAGraphMode.FULL)
    with torch.inference_mode():
        speculator.capture()
    return played
