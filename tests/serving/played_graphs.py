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
    def __init__(self, run: Callable[[CUDAGraphMode], None], metadata: Any) -> None:
        self.run = run
        self.metadata = metadata
        self.fresh: Any = None

    def replay(self) -> None:
        for layer, captured in self.metadata.items():
            fresh = self.fresh[layer]
            for name in _OURS:
                old, new = getattr(captured, name), getattr(fresh, name)
                assert (old.data_ptr(), old.shape) == (new.data_ptr(), new.shape), name
            # The CPU's backend makes a new schedule for each step, where those that
            # can be captured write into a buffer.
            captured.scheduler_metadata = fresh.scheduler_metadata
        self.run(CUDAGraphMode.NONE)


def play_graphs(
    speculator: Any, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, int]]:
    """Let the speculator of a running engine draft with "graphs".

    Args:
        speculator: Its config asks for graphs.
        sizes: Rows to capture for.
        monkeypatch: Undoes the changes to vLLM.

    Returns:
        Requests in the batch and in the graph, of each step from now on.
    """
    built: list[Any] = []
    played: list[tuple[int, int]] = []

    def recorded(**kwargs: Any) -> Any:
        kwargs["for_cudagraph_capture"] = False  # the CPU's backend cannot
        built.append(build(**kwargs))
        return built[-1]

    def capture(manager: Any, create_forward: Any, description: str) -> None:
        for batch in manager._capture_descs[CUDAGraphMode.FULL]:
            create_forward(batch, warmup=True)(CUDAGraphMode.NONE)
            run = create_forward(batch, warmup=False)
            run(CUDAGraphMode.NONE)
            manager.graphs[batch] = _Graph(run, built[-1])
        manager._graphs_captured = True

    def with_fresh_metadata(input_batch: Any, batch: Any) -> Any:
        metadata = block_metadata(input_batch, batch)
        assert batch.cg_mode == CUDAGraphMode.FULL
        speculator._graphs.graphs[batch].fresh = metadata
        played.append((input_batch.num_reqs, batch.num_reqs))
        return metadata

    build, block_metadata = v2.build_attn_metadata, speculator._block_metadata
    monkeypatch.setattr(v2, "build_attn_metadata", recorded)
    monkeypatch.setattr(CudaGraphManager, "capture", capture)
    monkeypatch.setattr(type(current_platform), "_global_graph_pool", (0, 0))
    monkeypatch.setattr(speculator, "_block_metadata", with_fresh_metadata)
    compilation = speculator.vllm_config.compilation_config
    compilation.cudagraph_capture_sizes = list(sizes)
    compilation.max_cudagraph_capture_size = max(sizes)
    speculator.attn_cg_support = AttentionCGSupportInfo()
    speculator.init_cudagraph_manager(CUDAGraphMode.FULL)
    with torch.inference_mode():
        speculator.capture()
    return played
