# SPDX-License-Identifier: Apache-2.0
"""A tensor whose values are computed when something first reads them.

On a CPU a draft runs in the runner's own thread. Made at once, it stands between the
tokens just sampled and whoever waits for them, which is felt most in the time to the
first token. Nothing reads the draft before the next step, so it can wait until then.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

# What a shape, type and place answer needs no values.
_ABOUT: frozenset[Any] = frozenset(
    [
        *(
            getattr(torch.Tensor, name).__get__
            for name in ("shape", "dtype", "device", "ndim", "layout", "is_cpu")
        ),
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.numel,
        torch.Tensor.__len__,
    ]
)


class LateTensor(torch.Tensor):
    """Made by `late`; whatever torch does with it computes it first."""

    _compute: Callable[[], torch.Tensor] | None

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _ABOUT:
                for value in tree_leaves((args, kwargs)):
                    if isinstance(value, cls):
                        value._fill()
            return func(*args, **kwargs)

    @torch.inference_mode()
    def _fill(self) -> None:
        if (compute := self._compute) is not None:
            self.copy_(compute())
            self._compute = None


def late(compute: Callable[[], torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    """What ``compute`` gives, but not before it is needed, and never twice.

    Args:
        compute: Called at most once, in inference mode, by the thread that first reads
            the tensor; not at all if none does. It must keep copies of what changes
            until then. What it raises, the reader gets.
        empty: Of the shape, type and device of its result. It is written to.
    """
    tensor = empty.as_subclass(LateTensor)
    tensor._compute = compute
    return tensor
