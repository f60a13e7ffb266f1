# SPDX-License-Identifier: Apache-2.0
"""Drafters for vLLM that read the target's own paged KV cache.

Importing this package is cheap, since vLLM does so in every process: names are
looked up when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_mtp.checkpoint import load_drafter, read_config, save_drafter
    from vllm_mtp.config import DrafterConfig
    from vllm_mtp.metrics import AcceptanceCounts, read_vllm_counters
    from vllm_mtp.modeling.drafter import Drafter
    from vllm_mtp.modeling.init import DrafterOptions, new_drafter
    from vllm_mtp.publishing.hub import push_to_hub, save_pretrained

_HOME = {
    "AcceptanceCounts": "vllm_mtp.metrics",
    "Drafter": "vllm_mtp.modeling.drafter",
    "DrafterConfig": "vllm_mtp.config",
    "DrafterOptions": "vllm_mtp.modeling.init",
    "load_drafter": "vllm_mtp.checkpoint",
    "new_drafter": "vllm_mtp.modeling.init",
    "push_to_hub": "vllm_mtp.publishing.hub",
    "read_config": "vllm_mtp.checkpoint",
    "read_vllm_counters": "vllm_mtp.metrics",
    "save_drafter": "vllm_mtp.checkpoint",
    "save_pretrained": "vllm_mtp.publishing.hub",
}

__all__ = [
    "AcceptanceCounts",
    "Drafter",
    "DrafterConfig",
    "DrafterOptions",
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
