# SPDX-License-Identifier: Apache-2.0
"""Adding up a KV-cache configuration, made up in vLLM's shape."""

from types import SimpleNamespace
from typing import Any

from vllm_mtp.evaluation.kv_cache import KVCache, KVCacheReader, kv_cache_of


def spec(page: int, block: int, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(page_size_bytes=page, block_size=block, **more)


def config(*groups: tuple[list[str], SimpleNamespace]) -> SimpleNamespace:
    return SimpleNamespace(
        kv_cache_groups=[
            SimpleNamespace(layer_names=names, kv_cache_spec=spec)
            for names, spec in groups
        ]
    )


def test_every_layer_counts_in_its_own_groups_blocks() -> None:
    found = kv_cache_of(config((["a", "b"], spec(640, 16)), (["c"], spec(640, 32))))
    assert found == KVCache(3, 40 + 40 + 20)


def test_a_group_of_layers_of_several_sizes() -> None:
    by_layer = {"a": spec(160, 16), "b": spec(320, 16)}
    whole = spec(480, 16, kv_cache_specs=by_layer)
    assert kv_cache_of(config((["a", "b"], whole))) == KVCache(2, 10 + 20)


def test_a_layer_that_reads_anothers_cache_is_not_counted_twice() -> None:
    reader: Any = KVCacheReader()
    reader.model_runner = SimpleNamespace(
        kv_cache_config=config((["a", "reads a"], spec(160, 16))),
        shared_kv_cache_layers={"reads a": "a"},
    )
    assert reader.mtp_kv_cache() == (1, 10)
