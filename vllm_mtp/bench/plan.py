# SPDX-License-Identifier: Apache-2.0
"""What a benchmark compares: sides under the same loads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_mtp.errors import MTPError

PLAIN = "none"
"""The side without speculation, which all others are held against."""


@dataclass(frozen=True)
class Side:
    """One server.

    Attributes:
        name: As the report shows it.
        speculative_config: As a user gives it to vLLM; None for no speculation.
        family: Sides that differ only in their number of tokens.
        num_speculative_tokens: 0 without speculation; None where the batch size
            decides.
    """

    name: str
    speculative_config: dict[str, Any] | None = None
    family: str = ""
    num_speculative_tokens: int | None = 0


@dataclass(frozen=True)
class Load:
    """Requests that every side answers.

    Attributes:
        name: As the report shows it.
        prompts: User messages; the target's chat template is applied, if it has one.
        concurrency: Requests in flight at once.
        output_tokens: Longest answer.
        varies: What the loads of one table differ in: ``concurrency``, ``context``
            or ``category``.
    """

    name: str
    prompts: tuple[str, ...]
    concurrency: int
    output_tokens: int
    varies: str = "concurrency"


@dataclass(frozen=True)
class Plan:
    """A whole benchmark.

    Attributes:
        target: The target's folder.
        dtype: The servers' type.
        max_model_len: The servers' limit, in tokens.
        rounds: How often each side meets each load; the sides take turns.
        enforce_eager: Whether the servers do not compile.
        chat_template: Whether the target has one.
        profiled_steps: How many decoding steps to profile; 0 for no profile.
        min_draft_probability: What our drafters get.
        fresh_servers: Whether every round has servers of its own.
        environment: Variables that all servers get beside those of this process.
        prompts: Where the prompts come from and how they were chosen, in words.
    """

    target: str
    dtype: str
    max_model_len: int
    rounds: int
    sides: tuple[Side, ...]
    loads: tuple[Load, ...]
    enforce_eager: bool = False
    chat_template: bool = True
    profiled_steps: int = 0
    min_draft_probability: float = 0.0
    fresh_servers: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    prompts: str = ""

    def loads_of(self, kind: str) -> tuple[Load, ...]:
        """Those of one table, see `Load.varies`."""
        return tuple(load for load in self.loads if load.varies == kind)

    @property
    def largest_batch(self) -> int:
        """Most requests at once."""
        return max(load.concurrency for load in self.loads)


def plain_side() -> Side:
    """The target alone."""
    return Side(PLAIN, family=PLAIN)


def ngram_side(k: int) -> Side:
    """vLLM's n-gram lookup, which needs no model."""
    config = {"method": "ngram", "num_speculative_tokens": k, "prompt_lookup_max": 4}
    return Side(f"ngram k={k}", config, "ngram", k)


def self_draft_side(target: str, k: int) -> Side:
    """The target as its own ``draft_model``: with a KV cache of its own, and k
    forwards per draft."""
    config = {"method": "draft_model", "model": target, "num_speculative_tokens": k}
    return Side(f"draft_model k={k}", config, "draft_model", k)


def drafter_side(name: str, folder: str, k: int, least: float = 0.0) -> Side:
    """One of our drafters, with k tokens.

    Args:
        name: The drafter's.
        folder: The drafter's.
        k: Tokens.
        least: ``min_draft_probability``.
    """
    return Side(f"{name} k={k}", _ours(folder, k, least), name, k)


def _ours(folder: str, k: int, least: float) -> dict[str, Any]:
    config = {"method": "mtp_placeholder", "model": folder, "num_speculative_tokens": k}
    return config | ({"min_draft_probability": least} if least else {})


def calibrated_side(
    name: str,
    folder: str,
    schedule: Sequence[tuple[int, int, int]],
    least: float = 0.0,
) -> Side:
    """One of our drafters, with a number of tokens for each batch size.

    Args:
        name: The drafter's.
        folder: The drafter's.
        schedule: (first batch size, last, tokens), as
            ``num_speculative_tokens_per_batch_size`` takes it.
        least: ``min_draft_probability``.
    """
    # More were slower at every batch size.
    most = max(1, *(tokens for _, _, tokens in schedule))
    config = _ours(folder, most, least) | {
        "num_speculative_tokens_per_batch_size": [list(entry) for entry in schedule]
    }
    return Side(f"{name} calibrated", config, f"{name} calibrated", None)


def require_enough(prompts: Sequence[str], wanted: int, source: str) -> None:
    """Raise unless there are so many prompts.

    Args:
        prompts: What the source gave.
        wanted: How many are needed.
        source: For the message: its name, and what was left out of it.

    Raises:
        MTPError: Names the source.
    """
    if len(prompts) < wanted:
        raise MTPError(
            f"--prompts {source}: got {len(prompts)} prompts, expected {wanted} or "
            "more; ask for less concurrency or take a larger source"
        )
