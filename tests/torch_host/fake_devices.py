# SPDX-License-Identifier: Apache-2.0
"""Devices that a machine without GPUs does not have: `fake:0`, `fake:1` and so on.

Their tensors compute on the CPU, but as on GPUs an operation on tensors of two devices
is an error, and only a copy brings one to another. torch knows them as its device for
backends made elsewhere, so a process that has imported this has them to its end.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

torch.utils.backend_registration._setup_privateuseone_for_python_backend("fake")
# A checkpoint asks for the device's autocast, also where there is none.
torch.fake.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]


class Fake(torch.Tensor):
    """A tensor of a fake device; ``inner`` is on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> "Fake":
        made: Fake = torch.Tensor._make_wrapper_subclass(  # type: ignore[assignment]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Fake({self.inner}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, _: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        return _run(op, args, kwargs or {})


def _run(op: Any, args: Any, kwargs: Any) -> Any:
    given = tree_leaves((args, kwargs))
    tensors = [value for value in given if isinstance(value, torch.Tensor)]
    # A number that is a tensor of the CPU may be used anywhere.
    devices = {t.device for t in tensors if t.ndim or isinstance(t, Fake)}
    if len(devices) > 1 and op not in COPIES:
        raise RuntimeError(f"{op}: tensors on {sorted(map(str, devices))}")
    result = op(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
    if op._schema.is_mutable:
        return next(t for t in tensors if _on_cpu(t) is result)
    asked = next((value for value in given if isinstance(value, torch.device)), None)
    device = asked or next(iter(devices), CPU)
    if device.type != "fake":
        return result
    return tree_map(lambda r: Fake(r, device) if _is_tensor(r) else r, result)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Fake):
        return value.inner
    return CPU if isinstance(value, torch.device) else value


def _empty_strided(size: Any, stride: Any, *, device: Any, **kwargs: Any) -> Fake:
    for name in ("layout", "pin_memory"):
        kwargs.pop(name, None)
    return Fake(torch.empty_strided(size, stride, device=CPU, **kwargs), device)


def _copy_from(source: torch.Tensor, target: Any, _: bool = False) -> torch.Tensor:
    _on_cpu(target).copy_(_on_cpu(source))
    return target  # type: ignore[no-any-return]


# `torch.tensor` asks for them without asking modes.
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        return _run(op, args, kwargs or {})


@contextmanager
def fake_devices() -> Iterator[None]:
    """Inside, tensors can be made on fake devices and copied to them."""
    # torch counts one device of this kind, and has a queue of backwards for each.
    with _Mode(), torch.autograd.set_multithreading_enabled(False):
        yield
