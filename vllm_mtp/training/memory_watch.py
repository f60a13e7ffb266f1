# SPDX-License-Identifier: Apache-2.0
"""Bytes of all tensors that live at once, by what they are; of fake tensors too."""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary


class MemoryWatch(TorchDispatchMode):
    """Counts the storage of every tensor that an operation inside it gives, until it is
    freed, and keeps the largest sum.

    torch's own `torch.distributed._tools.mem_tracker.MemTracker` counts the same (a
    test compares them) and splits it by module, which takes several times as long.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = "other"
        self._now: Counter[str] = Counter()
        self._peak: Mapping[str, int] = {}
        # Of a storage its label and bytes, which may still be changed.
        self._kept: Any = WeakIdKeyDictionary()

    @property
    def peak(self) -> dict[str, int]:
        """Bytes by label, at the moment when there were most."""
        return dict(self._peak)

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """What is made inside the block is called ``label``."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def count(self, tensor: torch.Tensor, label: str) -> None:
        """Count a tensor that was made outside, or call it something else."""
        storage = tensor.untyped_storage()
        kept: list[Any] | None = self._kept.get(storage)
        if kept is None:
            kept = self._kept[storage] = [label, storage.nbytes()]
            self._now[label] += storage.nbytes()
            weakref.finalize(storage, self._freed, kept).atexit = False
            self._note()
        elif kept[0] != label:
            self._now[kept[0]] -= kept[1]
            self._now[label] += kept[1]
            kept[0] = label

    def _freed(self, kept: list[Any]) -> None:
        self._now[kept[0]] -= kept[1]

    def _note(self) -> None:
        if self._now.total() > sum(self._peak.values()):
            self._peak = dict(self._now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._made, result)
        return result

    def _made(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage() not in self._kept:
            self.count(tensor, self.label)
        return tensor
