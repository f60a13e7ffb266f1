# SPDX-License-Identifier: Apache-2.0
"""What a drafter adds to the KV cache, by vLLM's own configuration of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serving.engines import ON_V2, engine
from vllm_mtp.evaluation.kv_cache import WORKER_EXTENSION, KVCache, read_kv_cache

pytestmark = pytest.mark.engine


def cache_of(target: Path, spec: dict[str, Any] | None) -> KVCache:
    settings = {"worker_extension_cls": WORKER_EXTENSION}
    with engine(target, spec, **settings) as llm:
        return read_kv_cache(llm)


@pytest.mark.skipif(ON_V2, reason="V1's rows; the demo's own engines are V1 on CPUs")
def test_ours_adds_nothing_and_a_draft_model_as_much_as_the_target(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    target = tiny_targets["llama"]
    plain = cache_of(target, None)
    # Four layers of keys and values, two heads of 32 numbers of four bytes.
    assert plain == KVCache(4, 4 * 2 * 2 * 32 * 4)
    ours = {"method": "mtp_placeholder", "model": str(tiny_drafter("llama", "mixed"))}
    assert cache_of(target, ours) == plain
    stock = {
        "method": "draft_model",
        "model": str(target),
        "num_speculative_tokens": 2,
    }
    assert cache_of(target, stock) == KVCache(8, 2 * plain.bytes_per_token)
