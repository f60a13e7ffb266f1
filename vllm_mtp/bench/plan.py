# SPDX-License-Identifier: Apache-2.0
"""What a benchmark compares: sides under the same loads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vllm_mtp.errors import MTPError
from vllm_mtp.plugin import METHOD
from vllm_mtp.serving.versions import forced_runner

PLAIN = "none"
"""The side without speculation, which all others are held against."""
CONTROL = "none again"
"""A second server without speculation: what it differs by is chance."""


@dataclass(frozen=True)
class Side:
    """What takes part in a benchmark: a server, or requests of one kind to a server.

    Attributes:
        name: As the report shows it.
        speculative_config: As a user gives it to vLLM; None for no speculation.
        family: Sides that differ only in their number of tokens.
        num_speculative_tokens: 0 without speculation; None where it changes while
            the server runs.
        per_request: Whether each request asks for that number. All such sides of a
            family share one server.
    """

    name: str
    speculative_config: dict[str, Any] | None = None
    family: str = ""
    num_speculative_tokens: int | None = 0
    per_request: bool = False

    @property
    def server(self) -> str:
        """The name of its server."""
        return f"{self.family}, any k" if self.per_request else self.name

    @property
    def extra_body(self) -> dict[str, Any] | None:
        """What its requests have beside those of other sides."""
        if not self.per_request:
            return None
        return {"vllm_xargs": {"num_speculative_tokens": self.num_speculative_tokens}}


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
    fresh_servers: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    prompts: str = ""

    def loads_of(self, kind: str) -> tuple[Load, ...]:
        """Those of one table, see `Load.varies`."""
        return tuple(load for load in self.loads if load.varies == kind)

    @property
    def servers(self) -> dict[str, Side]:
        """The first side of each server, by the server's name."""
        servers: dict[str, Side] = {}
        for side in self.sides:
            servers.setdefault(side.server, side)
        return servers

    @property
    def largest_batch(self) -> int:
        """Most requests at once."""
        return max(load.concurrency for load in self.loads)


def length_is_chosen_while_serving() -> bool:
    """Whether vLLM would use its V1 runner on a CPU.

    There our method chooses the number of tokens while it serves, and a request can ask
    for its own. Elsewhere both are fixed when the server starts.
    """
    return not torch.cuda.is_available() and forced_runner() != "V2"


def plain_side() -> Side:
    """The target alone."""
    return Side(PLAIN, family=PLAIN)


def control_side() -> Side:
    """The target alone once more."""
    return Side(CONTROL, family=PLAIN)


def ngram_side(k: int) -> Side:
    """vLLM's n-gram lookup, which needs no model."""
    config = {"method": "ngram", "num_speculative_tokens": k, "prompt_lookup_max": 4}
    return Side(f"ngram k={k}", config, "ngram", k)


def self_draft_side(target: str, k: int) -> Side:
    """The target as its own ``draft_model``: with a KV cache of its own, and k
    forwards per draft."""
    config = {"method": "draft_model", "model": target, "num_speculative_tokens": k}
    return Side(f"draft_model k={k}", config, "draft_model", k)


def drafter_side(name: str, folder: str, k: int) -> Side:
    """One of our drafters with k tokens, on a server of its own."""
    return Side(f"{name} k={k}", _ours(folder, num_speculative_tokens=k), name, k)


def drafter_sides(
    name: str, folder: str, lengths: Sequence[int], *, per_request: bool
) -> list[Side]:
    """One of our drafters with several fixed numbers of tokens.

    Args:
        name: The drafter's.
        folder: The drafter's.
        lengths: Numbers of tokens.
        per_request: Whether a request can ask for its own number. One server is enough
            then, for the largest.
    """
    sides = [drafter_side(name, folder, k) for k in lengths]
    if not per_request or len(sides) < 2:
        return sides
    config = _ours(folder, num_speculative_tokens=max(lengths))
    return [
        replace(side, speculative_config=config, per_request=True) for side in sides
    ]


def auto_side(name: str, folder: str) -> Side:
    """One of our drafters, with the number of tokens left to the method."""
    return Side(f"{name} auto", _ours(folder), f"{name} auto", None)


def calibrated_side(
    name: str, folder: str, schedule: Sequence[tuple[int, int, int]]
) -> Side:
    """One of our drafters, with a number of tokens for each batch size.

    Args:
        name: The drafter's.
        folder: The drafter's.
        schedule: (first batch size, last, tokens), as
            ``num_speculative_tokens_per_batch_size`` takes it.
    """
    # More were slower at every batch size.
    most = max(1, *(tokens for _, _, tokens in schedule))
    config = _ours(
        folder,
        num_speculative_tokens=most,
        num_speculative_tokens_per_batch_size=[list(entry) for entry in schedule],
    )
    return Side(f"{name} calibrated", config, f"{name} calibrated", None)


def _ours(folder: str, **settings: Any) -> dict[str, Any]:
    return {"method": METHOD, "model": folder, **settings}


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
