# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM's V2 model runner work without a GPU.

Python runs this file at start when its folder is on PYTHONPATH. vLLM asks Triton for
an active CPU driver before it believes in Triton; with ``TRITON_INTERPRET=1`` the
kernels then run, slowly, in Python. The runner's processes inherit all of it.
"""

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

from triton.backends import backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


backends.setdefault("cpu", SimpleNamespace(driver=_Driver))
