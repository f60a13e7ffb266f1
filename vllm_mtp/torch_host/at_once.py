# SPDX-License-Identifier: Apache-2.0
"""Whether slices of a computation are made for a CPU, whose cache they should fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_as_on_gpu: ContextVar[bool] = ContextVar("as_on_gpu", default=False)


def is_cpu(device: torch.device) -> bool:
    """Whether to cut for a CPU on this device."""
    return device.type == "cpu" and not _as_on_gpu.get()


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Slices inside the block are as large as on a GPU, wherever their tensors are."""
    token = _as_on_gpu.set(True)
    try:
        yield
    finally:
        _as_on_gpu.reset(token)
