# SPDX-License-Identifier: Apache-2.0
"""Random prompts for an engine."""

import random
from typing import NamedTuple


class Scenario(NamedTuple):
    """The prompts' lengths, and how many tokens to generate."""

    lengths: list[int]
    max_tokens: int = 40


def prompts(name: str, scenario: Scenario) -> list[list[int]]:
    """The same random prompts for the same name."""
    rng = random.Random(name)
    return [[rng.randrange(512) for _ in range(n)] for n in scenario.lengths]
