# SPDX-License-Identifier: Apache-2.0
"""Tiny fp32 targets in the real engine: the outputs must be the target's, token by
token, and a drafter that is the target must be accepted every time."""

import random
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.serving.conftest import DRAFTERS, FAMILIES
from tests.serving.engines import ON_V2, Run, engine, generate, num_kv_blocks

pytestmark = pytest.mark.engine

BLOCK = 32
MAX_MODEL_LEN = 256
EXACT = {"shared-1", "shared-4", "own-1"}


class Scenario(NamedTuple):
    """Which engine, the prompts' lengths, and how many tokens to generate."""

    settings: str
    lengths: list[int]
    max_tokens: int = 40
    repeats: int = 1


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
RUN_FAMILIES = ["llama"] if ON_V2 else list(FAMILIES)
# Qwen3 differs from Llama in its layers only: one drafter of each kind will do.
RUN_DRAFTERS = {
    "llama": ["shared-1", "mixed"] if ON_V2 else list(DRAFTERS),
    "qwen3": ["shared-1", "own-1", "mixed"],
}
PAIRS = [(family, name) for family in RUN_FAMILIES for name in RUN_DRAFTERS[family]]


def prompts(name: str) -> list[list[int]]:
    rng = random.Random(name)
    return [[rng.randrange(512) for _ in range(n)] for n in SCENARIOS[name].lengths]


def run_all(
    target: Path, spec: dict[str, Any] | None, names: Collection[str] = SCENARIOS
) -> dict[str, list[Run]]:
    """Scenarios on one side; those with the same settings share an engine."""
    runs: dict[str, list[Run]] = {}
    wanted = {name: SCENARIOS[name] for name in names}
    for settings, values in SETTINGS.items():
        if settings not in {scenario.settings for scenario in wanted.values()}:
            continue
        with engine(target, spec, **values) as llm:
            blocks[(str(target), spec is not None, settings)] = num_kv_blocks(llm)
            for name, scenario in wanted.items():
                if scenario.settings == settings:
                    runs[name] = [
                        generate(llm, prompts(name), scenario.max_tokens)
                        for _ in range(scenario.repeats)
                    ]
    return runs


blocks: dict[tuple[str, bool, str], int] = {}


class Sides(NamedTuple):
    """A target alone, and with one of its drafters."""

    target: Path
    drafter: str
    plain: dict[str, list[Run]]
    drafted: dict[str, list[Run]]


plain_runs: dict[str, dict[str, list[Run]]] = {}


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def sides(
    request: pytest.FixtureRequest,
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
) -> Sides:
    family, drafter = request.param
    target = tiny_targets[family]
    if family not in plain_runs:
        plain_runs[family] = run_all(target, None)
    folder = str(tiny_drafter(family, drafter))
    drafted = run_all(target, {"method": "mtp_placeholder", "model": folder})
    return Sides(target, drafter, plain_runs[family], drafted)


@pytest.mark.parametrize("name", SCENARIOS)
def test_outputs_are_the_targets(name: str, sides: Sides) -> None:
    for reference, run in zip(sides.plain[name], sides.drafted[name], strict=True):
        assert run.token_ids == reference.token_ids
        assert run.counts.drafts > 0


@pytest.mark.parametrize("name", SCENARIOS)
def test_first_place_of_an_exact_drafter_is_always_accepted(
    name: str, sides: Sides
) -> None:
    if sides.drafter not in EXACT:
        pytest.skip("not the target itself")
    # Where a block of several places passes the limit, its rows read a little less
    # of the prefix (`block.fit_blocks`): one draft per request may be worse.
    at_limit = name == "near-max-model-len" and DRAFTERS[sides.drafter][1] > 1
    excused = len(SCENARIOS[name].lengths) if at_limit else 0
    for run in sides.drafted[name]:
        assert run.counts.accepted_per_place[0] >= run.counts.drafts - excused
        assert run.counts.drafts > 2 * excused


def test_scenarios_do_what_they_are_named_for(sides: Sides) -> None:
    for runs in (sides.plain, sides.drafted):
        assert runs["batches"][0].largest > 1
        assert runs["prefix-cache"][1].prefix_hits > 0
        assert runs["preemption"][0].preemptions > 0
        assert runs["chunked-prefill"][0].chunked > 0
        assert runs["chunked-prefill"][0].mixed > 0
    name = "near-max-model-len"
    outputs = sides.plain[name][0].token_ids
    lengths = [
        prompt + len(output)
        for prompt, output in zip(SCENARIOS[name].lengths, outputs, strict=True)
    ]
    assert lengths.count(MAX_MODEL_LEN) == len(lengths) - 1


def test_prefix_cache_hits_are_those_of_the_target_alone(sides: Sides) -> None:
    plain, drafted = (
        [run.prefix_hits for run in runs["prefix-cache"]]
        for runs in (sides.plain, sides.drafted)
    )
    assert drafted == plain


def test_kv_pool_is_as_large_as_without_the_method(sides: Sides) -> None:
    for name in SETTINGS:
        with_drafter = blocks[(str(sides.target), True, name)]
        assert with_drafter == blocks[(str(sides.target), False, name)]
