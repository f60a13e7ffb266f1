# SPDX-License-Identifier: Apache-2.0
"""Drafters for vLLM that read the target's own paged KV cache.

Importing this package is cheap, since vLLM does so in every process: names are
looked up when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_mtp.drafter.checkpoint import load_drafter, read_config, save_drafter
    from vllm_mtp.drafter.config import DrafterConfig
    from vllm_mtp.drafter.model import Drafter
    from vllm_mtp.drafter.options import DrafterOptions
    from vllm_mtp.metrics import AcceptanceCounts, read_vllm_counters
    from vllm_mtp.sharing.hub import push_to_hub, save_pretrained
    from vllm_mtp.torch_host.new_drafter import new_drafter
    from vllm_mtp.training.co_training.callback import co_train

_HOME = {
    "AcceptanceCounts": "vllm_mtp.metrics",
    "Drafter": "vllm_mtp.drafter.model",
    "DrafterConfig": "vllm_mtp.drafter.config",
    "DrafterOptions": "vllm_mtp.drafter.options",
    "co_train": "vllm_mtp.training.co_training.callback",
    "load_drafter": "vllm_mtp.drafter.checkpoint",
    "new_drafter": "vllm_mtp.torch_host.new_drafter",
    "push_to_hub": "vllm_mtp.sharing.hub",
    "read_config": "vllm_mtp.drafter.checkpoint",
    "read_vllm_counters": "vllm_mtp.metrics",
    "save_drafter": "vllm_mtp.drafter.checkpoint",
    "save_pretrained": "vllm_mtp.sharing.hub",
}

__all__ = [
    "AcceptanceCounts",
    "Drafter",
    "DrafterConfig",
    "DrafterOptions",
    "co_train",
    "load_drafter",
    "new_drafter",
    "push_to_hub",
    "read_config",
    "read_vllm_counters",
    "save_drafter",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
