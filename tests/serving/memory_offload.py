# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV offloading where there is no GPU: blocks are copied with plain torch.

All but the copies is vLLM's own: what is stored, when, and what is found again. Its
class for this refuses CPUs.
"""

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

CONNECTOR = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "spec_name": "MemorySpec",
        "spec_module_path": __name__,
        "cpu_bytes_to_use": 64 << 20,
        # What was generated as well: behind it are the scratch slots.
        "offload_prompt_only": False,
    },
}
loads: Counter[int] = Counter()
"""How often blocks were loaded, by place."""
_blocks: dict[int, list[torch.Tensor]] = {}  # by place
_keys: dict[int, bytes] = {}


def stored() -> dict[bytes, list[torch.Tensor]]:
    """By vLLM's key of a block, its bytes in each cache tensor."""
    return {_keys[place]: tensors for place, tensors in _blocks.items()}


class _Manager(CPUOffloadingManager):
    """Also knows which key each place has (in the scheduler's process)."""

    def prepare_store(self, keys: Collection[Any], *args: Any) -> Any:
        output = super().prepare_store(keys, *args)
        if output is not None:
            places = output.store_spec.block_ids
            _keys.update(zip(map(int, places), output.keys_to_store, strict=True))
        return output


class _Worker(OffloadingWorker):
    """Copies at once."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for block, place in zip(src_spec.block_ids, dst_spec.block_ids, strict=True):
            _blocks[int(place)] = [t[int(block)].clone() for t in self._tensors]
        self._done.append(TransferResult(job_id, True))
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for place, block in zip(src_spec.block_ids, dst_spec.block_ids, strict=True):
            loads[int(place)] += 1
            for tensor, kept in zip(self._tensors, _blocks[int(place)], strict=True):
                tensor[int(block)] = kept
        self._done.append(TransferResult(job_id, True))
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        pass


class MemorySpec(CPUOffloadingSpec):
    """Named in `CONNECTOR`."""

    def get_manager(self) -> Any:
        if self._manager is None:
            loads.clear()
            _blocks.clear()
            _keys.clear()
            self._manager = _Manager(self.num_chunks)
        return self._manager

    def get_worker(self, kv_caches: Any) -> Any:
        return _Worker([cache.tensor for cache in kv_caches.tensors])
