# SPDX-License-Identifier: Apache-2.0
"""From scopes to parts that add up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mtp.bench.step_profile import (
    PARTS,
    Scope,
    StepProfile,
    part_of,
    table,
    time_of_parts,
)
from vllm_mtp.drafter import scopes

STEP = [
    Scope("llm_engine step: get_output", 0, 100),
    Scope("schedule: allocate_slots", 1, 3),
    Scope("gpu_model_runner: forward", 5, 65),
    Scope("aten::mm", 6, 60),
    Scope("gpu_model_runner: draft", 70, 95),
    Scope(scopes.LAYERS, 72, 84),
    Scope(scopes.HEAD, 84, 90),
    Scope("aten::mm", 85, 89),
    Scope(scopes.CHOICE, 90, 92),
    Scope("llm_engine step: process_outputs", 100, 104),
]


def test_every_moment_counts_once_and_for_the_innermost_scope() -> None:
    assert time_of_parts(STEP) == {
        "target: layers": 60,
        "draft: layers": 12,
        "draft: LM head": 6,
        "draft: choice": 2,
        "draft: the rest": 5,
        "texts, statistics": 4,
        # 2 in its own scope, and what the step has outside the runner.
        "scheduling, engine loop": 2 + 100 - 2 - 60 - 25,
    }


@given(st.permutations(STEP))
def test_the_order_of_the_scopes_does_not_matter(scopes: list[Scope]) -> None:
    assert time_of_parts(scopes) == time_of_parts(STEP)


def test_what_is_not_known_is_no_part() -> None:
    assert part_of("aten::mm") is None
    assert time_of_parts([Scope("aten::mm", 0, 9)]) == {}
    assert {part_of(scope.name) for scope in STEP} - {None} <= set(PARTS)


def test_the_table_says_how_much_is_explained() -> None:
    profile = StepProfile("cheap k=4", 1, 40, 110.0, 100.0, time_of_parts(STEP))
    assert profile.explained == pytest.approx(104 / 110)
    lines = table([profile]).splitlines()
    assert lines[0] == "| ms per step | cheap k=4, 1 at once |"
    assert "| draft: layers | 12.0 |" in lines
    assert "| **the step** | **110.0** |" in lines
    assert "| explained by the parts | 94.5% |" in lines
    assert not any(line.startswith("| sampling") for line in lines)
