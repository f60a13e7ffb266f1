# SPDX-License-Identifier: Apache-2.0
"""Tiny fp32 targets in the real engine: the outputs must be the target's, token by
token, and a drafter that is the target must be accepted every time."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.serving.conftest import DRAFTERS, FAMILIES
from tests.serving.engines import Run, engine, generate, num_kv_blocks

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
    "batches": Scenario(
        "default", [3, 17, 31, 32, 33, 63, 64, 65, 95, 96, 100, 128] * 2
    ),
    "alone": Scenario("default", [37]),
    # The second time, all prompts are found in the prefix cache.
    "prefix-cache": Scenario("default", [64, 96, 100, 130, 31, 200], repeats=2),
    # One, some and all requests stop at the limit.
    "near-max-model-len": Scenario(
        "default", [250, 240, 255, 20, 230, 251, 252, 253], max_tokens=60
    ),
    "chunked-prefill": Scenario("small-budget", [150, 30, 151, 97, 200, 10]),
    "preemption": Scenario("few-blocks", [90, 100, 110, 95, 105, 120], max_tokens=100),
}


def prompts(name: str) -> list[list[int]]:
    rng = random.Random(name)
    return [[rng.randrange(512) for _ in range(n)] for n in SCENARIOS[name].lengths]


def run_all(target: Path, spec: dict[str, Any] | None) -> dict[str, list[Run]]:
    """Every scenario on one side; those with the same settings share an engine."""
    runs: dict[str, list[Run]] = {}
    for settings, values in SETTINGS.items():
        with engine(target, spec, **values) as llm:
            blocks[(str(target), spec is not None, settings)] = num_kv_blocks(llm)
            for name, scenario in SCENARIOS.items():
                if scenario.settings == settings:
                    runs[name] = [
                        generate(llm, prompts(name), scenario.max_tokens)
                        for _ in range(scenario.repeats)
                    ]
    return runs


blocks: dict[tuple[str, bool, str], int] = {}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(family: str, tiny_targets: dict[str, Path]) -> dict[str, list[Run]]:
    """The target alone."""
    return run_all(tiny_targets[family], None)


@pytest.fixture(scope="module", params=DRAFTERS)
def drafted(
    request: pytest.FixtureRequest,
    family: str,
    plain: dict[str, list[Run]],
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
) -> Iterator[tuple[str, dict[str, list[Run]]]]:
    """The target with one of the drafters."""
    spec = {
        "method": "mtp_placeholder",
        "model": str(tiny_drafter(family, request.param)),
    }
    return request.param, run_all(tiny_targets[family], spec)


@pytest.mark.parametrize("name", SCENARIOS)
def test_outputs_are_the_targets(
    name: str,
    plain: dict[str, list[Run]],
    drafted: tuple[str, dict[str, list[Run]]],
) -> None:
    _, runs = drafted
    for reference, run in zip(plain[name], runs[name], strict=True):
        assert run.token_ids == reference.token_ids
        assert run.counts.drafts > 0


@pytest.mark.parametrize("name", SCENARIOS)
def test_first_place_of_an_exact_drafter_is_always_accepted(
    name: str, drafted: tuple[str, dict[str, list[Run]]]
) -> None:
    drafter, runs = drafted
    if drafter not in EXACT:
        pytest.skip("not the target itself")
    for run in runs[name]:
        # Drafts beyond the limit are never verified, so they count as drafts
        # without a token only where a request has no room for one.
        assert run.counts.accepted_per_place[0] == run.counts.drafts


def test_scenarios_do_what_they_are_named_for(
    plain: dict[str, list[Run]], drafted: tuple[str, dict[str, list[Run]]]
) -> None:
    _, runs = drafted
    for side in (plain, runs):
        assert side["prefix-cache"][1].prefix_hits > 0
        assert side["preemption"][0].preemptions > 0
    at_limit = [
        length + len(out)
        for length, out in zip(
            SCENARIOS["near-max-model-len"].lengths,
            plain["near-max-model-len"][0].token_ids,
            strict=True,
        )
    ]
    assert at_limit.count(MAX_MODEL_LEN) >= 6


def test_prefix_cache_hits_are_those_of_the_target_alone(
    plain: dict[str, list[Run]], drafted: tuple[str, dict[str, list[Run]]]
) -> None:
    _, runs = drafted
    hits = [run.prefix_hits for run in plain["prefix-cache"]]
    assert [run.prefix_hits for run in runs["prefix-cache"]] == hits


def test_kv_pool_is_as_large_as_without_the_method(
    family: str,
    tiny_targets: dict[str, Path],
    drafted: tuple[str, dict[str, list[Run]]],
) -> None:
    target = str(tiny_targets[family])
    for name in SETTINGS:
        assert blocks[(target, True, name)] == blocks[(target, False, name)]
