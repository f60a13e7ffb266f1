# SPDX-License-Identifier: Apache-2.0
"""KV connectors beside drafts: what they store, what they give back, when they are
called. vLLM's own classes, on both runners."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import (
    ExampleConnector,
)

from tests.serving import memory_offload
from tests.serving.async_scheduling import force_async_scheduling
from tests.serving.engines import ON_V2, Run, counters, engine, generate, watched_steps
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.serving.connectors import require_known_connector

pytestmark = pytest.mark.engine

LAYERS = 4
PROMPTS = [[(7 * i + j) % 512 for i in range(60 + 9 * j)] for j in range(3)]
LENGTH = 12 if ON_V2 else 50  # blocks of 32 fill up while decoding, too
# V2 drafts at once in any case, and its top-k is not for Triton's interpreter.
ENGINES = (
    ["scheduled ahead"] if ON_V2 else ["greedy", "probabilistic", "scheduled ahead"]
)

Drafter = Callable[[str, str], Path]


def spec_for(folder: Path, **more: str) -> dict[str, Any]:
    return {"method": "mtp_placeholder", "model": str(folder), **more}


def of_kind(
    kind: str, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Speculative config and sampling of one of `ENGINES`."""
    if kind == "scheduled ahead":
        force_async_scheduling(monkeypatch)
    if kind == "probabilistic":
        spec = spec_for(drafter, draft_sample_method=kind)
        return spec, {"temperature": 1.0, "top_k": 1, "seed": 3}
    return spec_for(drafter), {}


def on_disk(folder: Path) -> dict[str, Any]:
    extra = {"shared_storage_path": str(folder)}
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }


def external_hits(llm: Any) -> int:
    name = "vllm:external_prefix_cache_hits"
    return sum(int(m.value) for m in llm.get_metrics() if m.name == name)


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The attention layers' calls of the connector."""
    calls: list[str] = []

    def watch(name: str) -> None:
        original = getattr(ExampleConnector, name)

        def noted(self: Any, layer: str, *args: Any) -> None:
            calls.append(f"{name} {layer}")
            original(self, layer, *args)

        monkeypatch.setattr(ExampleConnector, name, noted)

    watch("wait_for_layer_load")
    watch("save_kv_layer")
    return calls


@pytest.mark.parametrize("kind", ENGINES)
def test_layers_call_a_connector_once_per_step(
    kind: str,
    hooks: list[str],
    tiny_targets: dict[str, Path],
    tiny_drafter: Drafter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And prompts that are found there give the same drafts and answers."""
    target = tiny_targets["llama"]
    folder = tiny_drafter("llama", "mixed")
    spec, sampling = of_kind(kind, folder, monkeypatch)
    with engine(target) as llm:
        alone = generate(llm, PROMPTS, LENGTH, **sampling)

    def through_connector(expected_hits: int) -> Run:
        hooks.clear()
        with engine(target, spec, kv_transfer_config=on_disk(tmp_path)) as llm:
            with watched_steps(llm) as steps:
                run = generate(llm, PROMPTS, LENGTH, **sampling)
            assert external_hits(llm) == expected_hits
        assert len(hooks) == 2 * LAYERS * len(steps)
        of_a_step = hooks[: 2 * LAYERS]
        assert len(set(of_a_step)) == 2 * LAYERS
        assert hooks == of_a_step * len(steps)
        assert run.token_ids == alone.token_ids
        assert 0 < run.counts.accepted_tokens < run.counts.draft_tokens
        return run

    first = through_connector(0)
    # Whole blocks of what stands before a prompt's last token.
    again = through_connector(sum((len(ids) - 1) // 32 * 32 for ids in PROMPTS))
    assert again.counts == first.counts


@pytest.mark.parametrize("kind", ENGINES)
def test_no_scratch_slot_is_stored(
    kind: str,
    tiny_targets: dict[str, Path],
    tiny_drafter: Drafter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What vLLM's offloading keeps of prompts and answers is what it keeps of the
    target alone; what this drafter leaves in its scratch slots is about 1e38."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # keys of blocks follow from it
    settings = {"kv_transfer_config": memory_offload.CONNECTOR}
    target = tiny_targets["llama"]
    folder = tiny_drafter("llama", "overflows")
    spec, sampling = of_kind(kind, folder, monkeypatch)
    runs, kept = [], []
    for asked in (None, spec):
        with engine(target, asked, **settings) as llm:
            run = generate(llm, PROMPTS, LENGTH, **sampling)
            # Without this, they would be found in vLLM's own cache.
            llm.reset_prefix_cache()
            again = generate(llm, PROMPTS, LENGTH, **sampling)
            assert external_hits(llm) >= 32 * len(PROMPTS)
            assert counters(llm)[1] == 0
        assert memory_offload.loads
        assert again.token_ids == run.token_ids
        runs.append(run)
        kept.append(memory_offload.stored())
    assert runs[1].token_ids == runs[0].token_ids
    assert runs[1].counts.drafts > 10
    alone, beside = kept
    assert alone.keys() == beside.keys()
    # Some blocks were filled while decoding.
    answers = sum((len(ids) + LENGTH) // 32 - len(ids) // 32 for ids in PROMPTS)
    assert len(alone) >= sum(len(ids) // 32 for ids in PROMPTS) + (answers > 1)
    for key, tensors in alone.items():
        for one, other in zip(tensors, beside[key], strict=True):
            torch.testing.assert_close(
                other.view(torch.float32),
                one.view(torch.float32),
                atol=1e-3,
                rtol=1e-3,
            )


@pytest.mark.skipif(ON_V2, reason="a matter of the check, not of the runner")
def test_several_connectors_at_once(
    hooks: list[str],
    tiny_targets: dict[str, Path],
    tiny_drafter: Drafter,
    tmp_path: Path,
) -> None:
    both = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "connectors": [on_disk(tmp_path / "a"), on_disk(tmp_path / "b")]
        },
    }
    spec = spec_for(tiny_drafter("llama", "shared-4"))
    with engine(tiny_targets["llama"]) as llm:
        alone = generate(llm, PROMPTS, LENGTH)
    with (
        engine(tiny_targets["llama"], spec, kv_transfer_config=both) as llm,
        watched_steps(llm) as steps,
    ):
        run = generate(llm, PROMPTS, LENGTH)
    assert run.token_ids == alone.token_ids
    assert len(hooks) == 2 * 2 * LAYERS * len(steps)


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        (None, None),
        ({}, None),
        ({"kv_connector": "NixlConnector"}, None),
        ({"kv_connector": "OffloadingConnector"}, None),
        ({"kv_connector": "LMCacheConnectorV1"}, "LMCacheConnectorV1"),
        ({"kv_connector": "SomeoneElses"}, "SomeoneElses"),
        (
            {
                "kv_connector": "MultiConnector",
                "kv_connector_extra_config": {
                    "connectors": [
                        {"kv_connector": "NixlConnector"},
                        {"kv_connector": "MooncakeConnector"},
                    ]
                },
            },
            "MooncakeConnector",
        ),
        ({"kv_connector": "MultiConnector"}, None),
        (
            {"kv_connector": "NixlConnector", "kv_connector_module_path": "mine"},
            "mine.NixlConnector",
        ),
    ],
)
def test_connectors_that_nobody_has_tried_are_refused(
    config: dict[str, Any] | None, refused: str | None
) -> None:
    if refused is None:
        require_known_connector(config)
        return
    with pytest.raises(UnsupportedTargetError) as error:
        require_known_connector(config)
    assert f"kv_transfer_config.kv_connector: got '{refused}'" in str(error.value)
    assert "expected one of ExampleConnector, NixlConnector" in str(error.value)
