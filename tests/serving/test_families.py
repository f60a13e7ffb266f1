# SPDX-License-Identifier: Apache-2.0
"""Tiny targets of other families than `test_exact.py`'s, with other kinds of KV cache,
and quantised. As there, the outputs must be the target's, token by token, and a drafter
that is the target must be accepted every time.

All prompts together are longer than the sliding windows, the token budget and the KV
pool, so that each engine meets chunked prefill, prefix-cache hits, preemption and the
length limit.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.serving.engines import ON_V2, cannot_here
from tests.serving.scenarios import (
    Scenario,
    Side,
    require_first_position_accepted,
    require_same_outputs,
    run_scenarios,
)

pytestmark = pytest.mark.engine

# No prompt is one token longer than whole blocks: after a prefix-cache hit, vLLM pads
# such a request's first step with drafts that no drafter has made.
SCENARIOS = {
    "chunked-prefill": Scenario("tight", [150, 3, 98, 34, 200, 64], 20),
    "prefix-cache": Scenario("tight", [200], 20, repeats=2),
    "preemption": Scenario("tight", [110, 100, 95, 105], 60),
    "near-max-model-len": Scenario("tight", [250, 240, 255, 20], 20),
}
if ON_V2:  # Triton's interpreter takes about 0.2 s per step
    SCENARIOS = {
        "chunked-prefill": Scenario("tight", [150, 3, 98], 6),
        "prefix-cache": Scenario("tight", [200], 6, repeats=2),
        "preemption": SCENARIOS["preemption"],
        "near-max-model-len": Scenario("tight", [250, 230], 20),
    }


class Case(NamedTuple):
    """A target, the drafters to try on it, and its engine."""

    family: str
    drafters: tuple[str, ...]  # the first in every run, all where slow tests run too
    num_blocks: int  # too few for four requests
    settings: dict[str, Any] = {}
    slow: bool = False  # the first as well
    preempts: bool = True  # where False, it may
    block_sizes: tuple[int, ...] = (32,)  # of the KV-cache groups, ascending


COPYABLE = ("shared-4", "own-1")
OTHERS = ("shared-4", "own-random")
CASES = {
    "qwen2": Case("qwen2", COPYABLE, 21, slow=True),
    # vLLM admits only as many requests as have room for their windows, and throws one
    # out only where lookahead slots are wanted too.
    "mistral": Case("mistral", COPYABLE, 9, preempts=False),
    "gemma3": Case("gemma3", OTHERS, 40, block_sizes=(32,) * 4),
    "gemma3-one-group": Case(
        "gemma3", ("shared-4",), 21, {"disable_hybrid_kv_cache_manager": True}
    ),
    "gemma2": Case("gemma2", ("shared-4",), 40, slow=True, block_sizes=(32,) * 4),
    "phi3": Case("phi3", OTHERS, 21, slow=True),
    "qwen3_moe": Case("qwen3_moe", OTHERS, 21),
    # Their layers give the whole stream, where others give it in two parts.
    "exaone4": Case("exaone4", OTHERS, 40, block_sizes=(32,) * 4),
    "cohere2": Case("cohere2", OTHERS, 40, slow=True, block_sizes=(32,) * 4),
    "gpt_oss": Case("gpt_oss", OTHERS, 40, slow=True, block_sizes=(32,) * 2),
    "int8-weights": Case("llama_w8a8", ("shared-4",), 21, slow=True),
    "fp8-cache": Case("llama", COPYABLE, 21, {"kv_cache_dtype": "fp8"}, slow=True),
    # The sliding-window layers keep their type, so that blocks differ in size.
    "gemma3-fp8-cache": Case(
        "gemma3",
        ("shared-4",),
        22,
        {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["sliding_window"]},
        slow=True,
        block_sizes=(32, 32, 32, 128),
    ),
}
EXACT = {"shared-4", "own-1"}
EVERY_RUN = {"gemma3"} if ON_V2 else {n for n, case in CASES.items() if not case.slow}
PAIRS = [
    pytest.param(
        (name, drafter),
        id=f"{name}-{drafter}",
        marks=[]
        if name in EVERY_RUN and drafter == case.drafters[0]
        else [pytest.mark.slow],
    )
    for name, case in CASES.items()
    for drafter in case.drafters
]

plain_sides: dict[str, Side] = {}


class Sides(NamedTuple):
    """A target alone, and with one of its drafters."""

    case: Case
    drafter: str
    plain: Side
    drafted: Side


@pytest.fixture(scope="module", params=PAIRS)
def sides(
    request: pytest.FixtureRequest,
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
) -> Sides:
    name, drafter = request.param
    case = CASES[name]
    if reason := cannot_here(case.settings):
        pytest.skip(reason)
    target = tiny_targets[case.family]
    tight = {
        "max_num_batched_tokens": 64,
        "max_num_seqs": 4,
        "num_gpu_blocks_override": case.num_blocks,
    }
    settings = {"tight": tight | case.settings}
    if name not in plain_sides:
        plain_sides[name] = run_scenarios(target, None, SCENARIOS, settings)
    folder = str(tiny_drafter(case.family, drafter))
    spec = {"method": "mtp_placeholder", "model": folder}
    drafted = run_scenarios(target, spec, SCENARIOS, settings)
    return Sides(case, drafter, plain_sides[name], drafted)


@pytest.mark.parametrize("name", SCENARIOS)
def test_outputs_are_the_targets(name: str, sides: Sides) -> None:
    require_same_outputs(sides.plain.runs[name], sides.drafted.runs[name])


@pytest.mark.parametrize("name", SCENARIOS)
def test_first_position_of_an_exact_drafter_is_always_accepted(
    name: str, sides: Sides
) -> None:
    if sides.drafter not in EXACT:
        pytest.skip("not the target itself")
    # As in `test_exact.py`: at the limit one draft per request may be worse.
    at_limit = name == "near-max-model-len" and sides.drafter == "shared-4"
    excused = len(SCENARIOS[name].lengths) if at_limit else 0
    require_first_position_accepted(sides.drafted.runs[name], excused)


def test_scenarios_do_what_they_are_named_for(sides: Sides) -> None:
    for side in (sides.plain, sides.drafted):
        assert side.runs["prefix-cache"][1].prefix_hits > 0
        assert side.runs["preemption"][0].preemptions > 0 or not sides.case.preempts
        assert side.block_sizes["tight"] == sides.case.block_sizes


def test_the_cache_is_the_targets_alone(sides: Sides) -> None:
    assert sides.drafted.num_blocks == sides.plain.num_blocks
    hits = [
        [run.prefix_hits for run in side.runs["prefix-cache"]]
        for side in (sides.plain, sides.drafted)
    ]
    assert hits[0] == hits[1]
