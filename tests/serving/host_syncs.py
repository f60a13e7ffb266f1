# SPDX-License-Identifier: Apache-2.0
"""Find the calls that would make the host wait for a GPU, on a CPU.

Reading a tensor's values on the host stalls every step, undoes async scheduling and
cannot be captured. On a CPU it works unnoticed, so these two modes look for the calls
themselves, and blame the first code outside torch: ours or vLLM's.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vllm_mtp

PACKAGE = str(Path(vllm_mtp.__file__).parent)
_TORCH = str(Path(torch.__file__).parent)

_aten = torch.ops.aten

# Read by value, or of a shape that depends on values.
_OPERATORS = {
    _aten._local_scalar_dense.default,
    _aten._unique2.default,
    _aten.argwhere.default,
    _aten.bincount.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.item.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten.nonzero_numpy.default,
    _aten.repeat_interleave.Tensor,
    _aten.repeat_interleave.self_Tensor,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
    _aten.where.default,
}
# With a mask as an index, too.
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
# On a CPU these reach no operator at all. The last ones copy from the host, which
# waits, too, unless the memory is pinned.
_FUNCTIONS = {
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.cpu,
    torch.Tensor.item,
    torch.tensor,
    torch.as_tensor,
    torch.from_numpy,
}


class _Found:
    def __init__(self, package: str) -> None:
        self.package = package
        self.host: set[int] = set()  # storages that lie on the host anyway
        self.positions: list[str] = []

    def add(self, name: str, args: Iterable[Any]) -> None:
        first = next((a for a in args if isinstance(a, torch.Tensor)), None)
        if first is not None and first.untyped_storage().data_ptr() in self.host:
            return
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith((_TORCH, __file__)):
            assert frame.f_back is not None
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(self.package):
            self.positions.append(
                f"{name}: {frame.f_code.co_filename}:{frame.f_lineno}"
            )


class _Operators(TorchDispatchMode):
    def __init__(self, found: _Found) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        masked = func.overloadpacket in _INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        )
        if masked or func in _OPERATORS:
            self.found.add(str(func), args)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, found: _Found) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _FUNCTIONS:
            self.found.add(func.__name__, args)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_syncs(
    host_tensors: Iterable[Any] = (), package: str = PACKAGE
) -> Iterator[list[str]]:
    """The syncs that code of ``package`` causes inside the block.

    Args:
        host_tensors: Tensors that are on the host also where there is a GPU.
        package: Folder of the code that is to blame.
    """
    found = _Found(package)
    found.host = {
        tensor.untyped_storage().data_ptr()
        for tensor in host_tensors
        if isinstance(tensor, torch.Tensor)
    }
    with _Functions(found), _Operators(found):
        yield found.positions


def watch_propose(
    drafter: Any, host_tensors_of: Callable[[tuple[Any, ...]], Iterable[Any]]
) -> tuple[list[str], list[int]]:
    """Look at every step of a drafter that either runner has built.

    Args:
        drafter: Its ``propose`` is replaced.
        host_tensors_of: Those among the arguments of ``propose``.

    Returns:
        What was found, and the number of requests in each step; both grow.
    """
    propose, head = drafter.propose, drafter._bound.small_head
    if head is not None:
        head._can_look = False  # as on a device
    positions: list[str] = []
    sizes: list[int] = []

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        with host_syncs(host_tensors_of((*args, *kwargs.values()))) as found:
            drafts: torch.Tensor = propose(*args, **kwargs)
        positions.extend(found)
        sizes.append(len(drafts))
        return drafts

    drafter.propose = watched
    return positions, sizes
