# SPDX-License-Identifier: Apache-2.0
"""What the exactness tests let an engine do, without and with a drafter."""

import random
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.serving.engines import (
    Run,
    engine,
    generate,
    kv_block_sizes,
    num_kv_blocks,
)


class Scenario(NamedTuple):
    """Which engine, the prompts' lengths, and how many tokens to generate."""

    settings: str
    lengths: list[int]
    max_tokens: int = 40
    repeats: int = 1


class Side(NamedTuple):
    """What one target did, alone or with one drafter."""

    runs: dict[str, list[Run]]  # by scenario; one per repeat
    num_blocks: dict[str, int]  # by settings; size of the KV pool
    block_sizes: dict[str, tuple[int, ...]]  # by settings; of the KV-cache groups


def prompts(name: str, scenario: Scenario) -> list[list[int]]:
    """The same random prompts for the same name."""
    rng = random.Random(name)
    return [[rng.randrange(512) for _ in range(n)] for n in scenario.lengths]


def run_scenarios(
    target: Path,
    spec: dict[str, Any] | None,
    scenarios: Mapping[str, Scenario],
    settings: Mapping[str, Mapping[str, Any]],
) -> Side:
    """Run every scenario; those with the same settings share an engine."""
    side = Side({}, {}, {})
    used = {scenario.settings for scenario in scenarios.values()}
    for kind, values in settings.items():
        if kind not in used:
            continue
        with engine(target, spec, **values) as llm:
            side.num_blocks[kind] = num_kv_blocks(llm)
            side.block_sizes[kind] = kv_block_sizes(llm)
            for name, scenario in scenarios.items():
                if scenario.settings == kind:
                    side.runs[name] = [
                        generate(llm, prompts(name, scenario), scenario.max_tokens)
                        for _ in range(scenario.repeats)
                    ]
    return side


def require_same_outputs(plain: Collection[Run], drafted: Collection[Run]) -> None:
    """Token by token, and with drafts at all."""
    for reference, run in zip(plain, drafted, strict=True):
        assert run.token_ids == reference.token_ids
        assert run.counts.drafts > 0


def require_first_position_accepted(runs: Collection[Run], excused: int = 0) -> None:
    """Every draft's first token, but for ``excused`` of them."""
    for run in runs:
        assert run.counts.accepted_per_position[0] >= run.counts.drafts - excused
        assert run.counts.drafts > 2 * excused
