# SPDX-License-Identifier: Apache-2.0
"""What an engine's KV cache holds, as vLLM itself has configured it."""

from typing import Any, NamedTuple

WORKER_EXTENSION = "vllm_mtp.evaluation.kv_cache.KVCacheReader"
"""For vLLM's ``worker_extension_cls``: the workers may be other processes."""


class KVCache(NamedTuple):
    """The KV cache of one worker.

    Attributes:
        layers: Layers that keep keys and values of their own.
        bytes_per_token: What all of them together keep of one token.
    """

    layers: int
    bytes_per_token: float


class KVCacheReader:
    """A method that vLLM's workers get (`LLM(worker_extension_cls=...)`)."""

    def mtp_kv_cache(self) -> tuple[int, float]:
        """A `KVCache` as plain numbers, which any of vLLM's transports takes."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        shared = getattr(runner, "shared_kv_cache_layers", {})
        found = kv_cache_of(runner.kv_cache_config, without=shared)
        return found.layers, found.bytes_per_token


def read_kv_cache(llm: Any) -> KVCache:
    """Ask an engine that was started with `WORKER_EXTENSION`; the first worker's.

    Args:
        llm: A ``vllm.LLM``.
    """
    first, *_ = llm.collective_rpc("mtp_kv_cache")
    return KVCache(*first)


def kv_cache_of(config: Any, without: Any = ()) -> KVCache:
    """Add up a ``vllm.v1.kv_cache_interface.KVCacheConfig``.

    Args:
        config: The configuration that the cache was made by.
        without: Names of layers that only read another layer's cache.
    """
    specs = [
        _spec_of(group.kv_cache_spec, name)
        for group in config.kv_cache_groups
        for name in group.layer_names
        if name not in without
    ]
    return KVCache(
        len(specs), sum(spec.page_size_bytes / spec.block_size for spec in specs)
    )


def _spec_of(spec: Any, layer_name: str) -> Any:
    """A layer's own, where a group holds layers of several sizes."""
    by_layer = getattr(spec, "kv_cache_specs", None)
    return spec if by_layer is None else by_layer[layer_name]
