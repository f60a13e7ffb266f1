# SPDX-License-Identifier: Apache-2.0
"""Names for the stages of a draft, as a profiler shows them."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function

DRAFT = "mtp_placeholder: draft"  # the stages below, and what lies between them
LAYERS = "mtp_placeholder: layers"
HEAD = "mtp_placeholder: LM head"
CHOICE = "mtp_placeholder: choice"


def scope(name: str) -> AbstractContextManager[object]:
    """Shows a stage to torch's profiler; next to nothing while none runs.

    A bare `record_function` would take 10 microseconds each time, on a GPU's host
    too.
    """
    running = torch.autograd.profiler._is_profiler_enabled
    return record_function(name) if running else nullcontext()
