# SPDX-License-Identifier: Apache-2.0
"""Where a step's time goes: from what a profiler saw to parts that add up."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vllm_mtp import markdown
from vllm_mtp.bench.plan import PLAIN
from vllm_mtp.drafter import scopes as of_draft

# A scope belongs to the first part with a beginning of its name. All but the drafter's
# are vLLM's own (VLLM_CUSTOM_SCOPES_FOR_PROFILING), of the V1 runner and the engine.
_PARTS = (
    ("target: layers", ("gpu_model_runner: forward",)),
    ("target: LM head", ("gpu_model_runner: postprocess",)),
    ("draft: layers", (of_draft.LAYERS,)),
    ("draft: LM head", (of_draft.HEAD,)),
    ("draft: choice", (of_draft.CHOICE,)),
    ("draft: the rest", (of_draft.DRAFT, "gpu_model_runner: draft")),
    ("sampling, verification", ("gpu_model_runner: sample",)),
    ("inputs, outputs of the runner", ("gpu_model_runner: ",)),
    ("texts, statistics", ("llm_engine step: process", "llm_engine step: record")),
    ("scheduling, engine loop", ("llm_engine step: ", "schedule: ")),
)
PARTS = tuple(name for name, _ in _PARTS)
"""All parts, in the order of a table."""


class Scope(NamedTuple):
    """A stretch of time with a name; scopes nest."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class StepProfile:
    """An average step of one side.

    Attributes:
        side: Its name.
        batch: Requests at once.
        steps: How many were averaged.
        ms: Of a step, on the wall, while the profiler ran.
        undisturbed_ms: Likewise, before it was started.
        parts: Milliseconds by name of the part; only those that were seen.
        drafter: Its name; empty without speculation.
        tokens: Of a draft.
    """

    side: str
    batch: int
    steps: int
    ms: float
    undisturbed_ms: float
    parts: dict[str, float]
    drafter: str = ""
    tokens: int = 0

    @property
    def explained(self) -> float:
        """How much of the step the parts add up to, at most 1."""
        return sum(self.parts.values()) / self.ms

    @property
    def draft_ms(self) -> float:
        """Of a step, spent on drafting."""
        return sum(ms for part, ms in self.parts.items() if part.startswith("draft: "))


class Beside(NamedTuple):
    """A step with a draft beside one without.

    Attributes:
        draft: The draft's time over that of the step without, both under the profiler.
        step: The whole step's time over that of the step without, both undisturbed:
            the acceptance length at which nothing is won or lost.
    """

    draft: float
    step: float


def beside_plain(
    profile: StepProfile, profiles: Iterable[StepProfile]
) -> Beside | None:
    """Hold a side's step against that of `plan.PLAIN` with as many requests.

    Returns:
        None where the side drafts nothing, or the other step is not there.
    """
    for plain in profiles:
        if (plain.side, plain.batch) == (PLAIN, profile.batch) and profile.draft_ms:
            return Beside(
                profile.draft_ms / plain.ms,
                profile.undisturbed_ms / plain.undisturbed_ms,
            )
    return None


def part_of(name: str) -> str | None:
    """The part that a scope belongs to; None for other things that a profiler saw."""
    for part, beginnings in _PARTS:
        if name.startswith(beginnings):
            return part
    return None


def time_of_parts(scopes: Iterable[Scope]) -> dict[str, float]:
    """The time in each part, in the scopes' unit.

    What a scope spends in scopes inside it counts for these alone, so every moment
    counts once.

    Args:
        scopes: Of one thread, in any order; those of no part are left out.

    Returns:
        By part, in the order of `PARTS`.
    """
    times: dict[str, float] = {}
    open_scopes: list[tuple[str, float]] = []  # part, end
    known = [(part_of(scope.name), scope) for scope in scopes]
    ours = [(part, scope) for part, scope in known if part is not None]
    for part, scope in sorted(ours, key=lambda item: (item[1].start, -item[1].end)):
        while open_scopes and open_scopes[-1][1] <= scope.start:
            open_scopes.pop()
        length = scope.end - scope.start
        times[part] = times.get(part, 0.0) + length
        if open_scopes:
            times[open_scopes[-1][0]] -= length
        open_scopes.append((part, scope.end))
    return {part: times[part] for part in PARTS if part in times}


def table(profiles: Sequence[StepProfile]) -> str:
    """Milliseconds by part (rows) and side (columns), as Markdown."""
    head = ["ms per step", *(f"{p.side}, {p.batch} at once" for p in profiles)]
    rows = [
        [part, *(_ms(p.parts.get(part)) for p in profiles)]
        for part in PARTS
        if any(part in profile.parts for profile in profiles)
    ]
    rows += [
        ["**the step**", *(f"**{p.ms:.1f}**" for p in profiles)],
        ["explained by the parts", *(f"{p.explained:.1%}" for p in profiles)],
        ["the step without the profiler", *(_ms(p.undisturbed_ms) for p in profiles)],
    ]
    found = [beside_plain(profile, profiles) for profile in profiles]
    if any(found):
        rows += [
            [f"the draft, of a step of `{PLAIN}`", *(_ratio(b, 0) for b in found)],
            [f"the step, of one of `{PLAIN}`", *(_ratio(b, 1) for b in found)],
        ]
    return markdown.table(head, rows, numbers=True)


def _ratio(beside: Beside | None, index: int) -> str:
    return "" if beside is None else f"{beside[index]:.2f}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
