# SPDX-License-Identifier: Apache-2.0
"""Tiny fp32 targets in the real engine: the outputs must be the target's, token by
token, and a drafter that is the target must be accepted every time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.serving.conftest import DRAFTERS
from tests.serving.engines import ON_V2
from tests.serving.scenarios import (
    Scenario,
    Side,
    require_first_position_accepted,
    require_same_outputs,
    run_scenarios,
)

pytestmark = pytest.mark.engine

MAX_MODEL_LEN = 256
EXACT = {"shared-1", "shared-4", "own-1"}

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    # Long prompts in small pieces.
    "small-budget": {"max_num_batched_tokens": 64, "max_num_seqs": 4},
    # Fewer blocks than the requests need: some are thrown out and start again.
    "few-blocks": {"num_gpu_blocks_override": 21},
}
SCENARIOS = {
    # Around block boundaries, more requests than fit one batch.
    "batches": Scenario("default", [3, 17, 31, 32, 33, 63, 64, 65, 95, 96, 100, 128]),
    "alone": Scenario("default", [37]),
    # The second time, all prompts are found in the prefix cache.
    "prefix-cache": Scenario("default", [64, 96, 100, 130, 31, 200], repeats=2),
    # One, some and all requests stop at the limit.
    "near-max-model-len": Scenario(
        "default", [250, 240, 255, 20, 230, 251, 252, 253], max_tokens=30
    ),
    "chunked-prefill": Scenario("small-budget", [150, 30, 151, 97, 200, 10]),
    "preemption": Scenario("few-blocks", [90, 100, 110, 95, 105, 120], max_tokens=70),
}
if ON_V2:  # Triton's interpreter takes about 0.2 s per step
    SCENARIOS = {
        "batches": Scenario("default", [3, 31, 32, 33, 64], 10),
        "prefix-cache": Scenario("default", [64, 100, 31], 10, repeats=2),
        "near-max-model-len": Scenario("default", [250, 240, 255, 20, 253], 20),
        "chunked-prefill": Scenario("small-budget", [150, 30, 151], 10),
        "preemption": Scenario("few-blocks", [150, 150, 150, 150], 30),
    }
RUN_FAMILIES = ["llama"] if ON_V2 else ["llama", "qwen3"]
# Qwen3 differs from Llama in its layers only: one drafter of each kind will do.
RUN_DRAFTERS = {
    "llama": ["shared-1", "mixed"]
    if ON_V2
    else ["shared-1", "shared-4", "own-1", "own-some", "mixed", "overflows"],
    "qwen3": ["shared-1", "own-1", "mixed"],
}
PAIRS = [(family, name) for family in RUN_FAMILIES for name in RUN_DRAFTERS[family]]


class Sides(NamedTuple):
    """A target alone, and with one of its drafters."""

    drafter: str
    plain: Side
    drafted: Side


plain_sides: dict[str, Side] = {}


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def sides(
    request: pytest.FixtureRequest,
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
) -> Sides:
    family, drafter = request.param
    target = tiny_targets[family]
    if family not in plain_sides:
        plain_sides[family] = run_scenarios(target, None, SCENARIOS, SETTINGS)
    spec = {"method": "mtp_placeholder", "model": str(tiny_drafter(family, drafter))}
    drafted = run_scenarios(target, spec, SCENARIOS, SETTINGS)
    return Sides(drafter, plain_sides[family], drafted)


@pytest.mark.parametrize("name", SCENARIOS)
def test_outputs_are_the_targets(name: str, sides: Sides) -> None:
    require_same_outputs(sides.plain.runs[name], sides.drafted.runs[name])


@pytest.mark.parametrize("name", SCENARIOS)
def test_first_position_of_an_exact_drafter_is_always_accepted(
    name: str, sides: Sides
) -> None:
    if sides.drafter not in EXACT:
        pytest.skip("not the target itself")
    # Where a block of several positions passes the limit, its rows read a little less
    # of the prefix (`layout.lay_out`): one draft per request may be worse.
    at_limit = name == "near-max-model-len" and DRAFTERS[sides.drafter][1] > 1
    excused = len(SCENARIOS[name].lengths) if at_limit else 0
    require_first_position_accepted(sides.drafted.runs[name], excused)


def test_scenarios_do_what_they_are_named_for(sides: Sides) -> None:
    for runs in (sides.plain.runs, sides.drafted.runs):
        assert runs["prefix-cache"][1].prefix_hits > 0
        assert runs["preemption"][0].preemptions > 0
        assert runs["chunked-prefill"][0].chunked > 0
        assert runs["chunked-prefill"][0].mixed > 0
    name = "near-max-model-len"
    outputs = sides.plain.runs[name][0].token_ids
    lengths = [
        prompt + len(output)
        for prompt, output in zip(SCENARIOS[name].lengths, outputs, strict=True)
    ]
    assert lengths.count(MAX_MODEL_LEN) == len(lengths) - 1


def test_prefix_cache_hits_are_those_of_the_target_alone(sides: Sides) -> None:
    plain, drafted = (
        [run.prefix_hits for run in runs["prefix-cache"]]
        for runs in (sides.plain.runs, sides.drafted.runs)
    )
    assert drafted == plain


def test_kv_pool_is_as_large_as_without_the_method(sides: Sides) -> None:
    assert sides.drafted.num_blocks == sides.plain.num_blocks
