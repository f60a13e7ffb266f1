# SPDX-License-Identifier: Apache-2.0
"""The drafter keeps nothing: it changes no cached token, and drafts the same wherever
and however a request's prefix came into the cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM

from tests.serving.engines import (
    ON_V2,
    bound_drafter_of,
    core_of,
    engine,
    generate,
    runner_of,
)
from tests.serving.scenarios import Scenario, prompts

pytestmark = pytest.mark.engine

MAX_MODEL_LEN = 256
BLOCK_SIZE = 32
MAX_TOKENS = 14 if ON_V2 else 40
LENGTHS = [155, 150, 156, 152] if ON_V2 else [150, 100, 31, 64, 120, 140, 110, 96]
FEW_BLOCKS = {"num_gpu_blocks_override": 21 if ON_V2 else 22}


@dataclass
class Step:
    """One call of ``propose``."""

    names: list[str]  # of the requests
    anchors: list[int]
    prefix_lens: list[int]
    drafts: list[list[int]]
    strayed: int = 0  # numbers of the cache that changed outside the scratch slots
    written: int = 0  # those that changed inside
    allowed: int = 0  # all inside


@contextmanager
def watched_drafts(llm: LLM, *, compare_cache: bool = False) -> Iterator[list[Step]]:
    """What the drafter is given and gives, step by step."""
    runner, bound, steps = runner_of(llm), bound_drafter_of(llm), []
    drafter = runner.speculator if ON_V2 else runner.drafter
    # V1 drafts when the drafts are fetched.
    name = "propose" if ON_V2 else "late_drafts"
    draft, propose, blocks = getattr(drafter, name), bound.propose, []

    def watched_propose(anchors: Any, positions: Any, *args: Any, **kwargs: Any) -> Any:
        blocks.append((anchors.tolist(), positions.clone()))
        return propose(anchors, positions, *args, **kwargs)

    def watched_draft(*args: Any, **kwargs: Any) -> Any:
        layers = attention_layers(runner) if compare_cache else []
        before = [layer.kv_cache.clone() for layer in layers]
        drafts = draft(*args, **kwargs)
        if not blocks:  # no request goes on
            return drafts
        made = drafts.tolist() if torch.is_tensor(drafts) else drafts
        anchors, positions = blocks.pop()
        names, table = _batch(runner, args)
        rows = [row for row, tokens in enumerate(made) if tokens]
        names, made = [names[row] for row in rows], [made[row] for row in rows]
        steps.append(Step(names, anchors, positions[:, 0].tolist(), made))
        slots = scratch_slots(table[rows], positions.shape[1], positions[:, 0].tolist())
        for layer, old in zip(layers, before, strict=True):
            # As integers, so that a NaN is like itself.
            changed = old.view(torch.int32) != layer.kv_cache.view(torch.int32)
            scratch = held_by(layer, slots)
            steps[-1].strayed += int((changed & ~scratch).sum())
            steps[-1].written += int((changed & scratch).sum())
            steps[-1].allowed += int(scratch.sum())
        return drafts

    bound.propose = watched_propose
    setattr(drafter, name, watched_draft)
    try:
        yield steps
    finally:
        delattr(drafter, name)
        del bound.propose


def _batch(runner: Any, args: Sequence[Any]) -> tuple[list[str], torch.Tensor]:
    """Names and block tables ``[B, M]`` of the requests of a step."""
    if ON_V2:
        rows = args[0].idx_mapping[: args[0].num_reqs].long()
        return list(args[0].req_ids), runner.block_tables.block_tables[0].gpu[rows]
    batch = runner.input_batch
    return list(batch.req_ids), batch.block_table[0].get_device_tensor(batch.num_reqs)


def attention_layers(runner: Any) -> list[Any]:
    """The target's attention layers, each with its cache."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    return list(get_layers_from_vllm_config(runner.vllm_config, Attention).values())


def scratch_slots(
    table: torch.Tensor, num_draft_tokens: int, prefix_lens: Sequence[int]
) -> list[int]:
    """Slots of positions n to n + k - 1, below the limit."""
    return [
        int(table[row, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
        for row, start in enumerate(prefix_lens)
        for position in range(start, min(start + num_draft_tokens, MAX_MODEL_LEN))
    ]


def held_by(layer: Any, slots: Sequence[int]) -> torch.Tensor:
    """Which numbers of a layer's cache hold the given slots. As the cache, bool.

    Backends lay the cache out as they like, so vLLM itself is let write there.
    """
    blank = torch.zeros_like(layer.kv_cache)
    ones = torch.ones(len(slots), layer.num_kv_heads, layer.head_size)
    layer.impl.do_kv_cache_update(layer, ones, ones, blank, torch.tensor(slots))
    return blank != 0


@pytest.fixture(scope="module")
def spec(tiny_drafter: Callable[[str, str], Path]) -> dict[str, Any]:
    return {"method": "mtp_placeholder", "model": str(tiny_drafter("llama", "mixed"))}


@pytest.mark.parametrize("name", ["mixed", "chain"])
def test_a_draft_changes_no_byte_outside_the_scratch_slots(
    name: str, tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    spec = {"method": "mtp_placeholder", "model": str(tiny_drafter("llama", name))}
    scenario = Scenario([*LENGTHS, 250, 253], MAX_TOKENS)
    with (
        engine(tiny_targets["llama"], spec, **FEW_BLOCKS) as llm,
        watched_drafts(llm, compare_cache=True) as steps,
    ):
        run = generate(llm, prompts("checksum", scenario), MAX_TOKENS)
    assert run.preemptions > 0
    assert any(max(step.prefix_lens) > MAX_MODEL_LEN - 4 for step in steps)
    assert sum(step.strayed for step in steps) == 0
    written, allowed = (
        sum(getattr(step, name) for step in steps) for name in ("written", "allowed")
    )
    assert written > 0.9 * allowed  # the comparison sees what is written
    print(f"{len(steps)} drafts wrote {written} numbers, all into the scratch slots")


def drafts_by_position(
    llm: LLM, texts: list[list[int]]
) -> tuple[dict[tuple[int, int], list[int]], Any]:
    """Drafts by prompt and prefix length, of positions where decoding drafts."""
    scheduler, names = core_of(llm).scheduler, {}
    add = scheduler.add_request

    def watched_add(request: Any) -> None:
        names[request.request_id] = texts.index(list(request.prompt_token_ids))
        add(request)

    scheduler.add_request = watched_add
    with watched_drafts(llm) as steps:
        run = generate(llm, texts, MAX_TOKENS)
    del scheduler.add_request
    said = [text + ids for text, ids in zip(texts, run.token_ids, strict=True)]
    found: dict[tuple[int, int], list[int]] = {}
    for step in steps:
        rows = zip(step.names, step.anchors, step.prefix_lens, step.drafts, strict=True)
        for name, anchor, start, drafts in rows:
            text = names[name]
            decoding = len(texts[text]) <= start < len(said[text])
            # In an unfinished prompt, what stands at the anchor's position is nobody's.
            if decoding and said[text][start] == anchor:
                found[text, start] = drafts
    return found, run


def test_a_moved_request_drafts_what_it_would_have_drafted(
    tiny_targets: dict[str, Path], spec: dict[str, Any]
) -> None:
    texts = prompts("moved", Scenario(LENGTHS))
    with engine(tiny_targets["llama"], spec) as llm:
        alone, _ = drafts_by_position(llm, texts)
        again, hit = drafts_by_position(llm, texts)
    with engine(tiny_targets["llama"], spec, **FEW_BLOCKS) as llm:
        moved, run = drafts_by_position(llm, texts)
    assert hit.prefix_hits > 0
    assert run.preemptions > 0
    assert len(alone) > 20
    assert again == alone
    shared = alone.keys() & moved.keys()
    assert len(shared) > 0.8 * len(alone)
    assert {position: moved[position] for position in shared} == {
        position: alone[position] for position in shared
    }
    print(f"{len(alone)} drafts again behind prefix hits, {len(shared)} preempted")
