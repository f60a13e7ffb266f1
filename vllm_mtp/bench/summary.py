# SPDX-License-Identifier: Apache-2.0
"""From records to what a report says: medians, spreads, ratios and verdicts, the best
number of tokens for each batch size."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_mtp.bench.client import LoadResult
from vllm_mtp.bench.loads import CONCURRENCY
from vllm_mtp.bench.measure import Record
from vllm_mtp.bench.plan import CONTROL, PLAIN, Plan, Side
from vllm_mtp.bench.step_profile import StepProfile, beside_plain
from vllm_mtp.metrics import AcceptanceCounts
from vllm_mtp.sharing.speed import SpeedRecord, SpeedRow, StepRow

Verdict = Literal["faster", "within", "slower"]


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def verdict_beside(self, control: "Spread") -> Verdict:
        """Where the median lies, beside all that the control gave."""
        if self.median < control.low:
            return "slower"
        return "faster" if self.median > control.high else "within"


@dataclass(frozen=True)
class Line:
    """One side under one load, over all rounds.

    Attributes:
        side: Its name.
        load: Its name.
        tokens_per_s: Output tokens of all requests per second.
        ratio: Tokens/s over those of the side without speculation in the same round.
        ttft_ratio: Time to the first token, likewise: below 1 is sooner.
        tpot_ratio: Time per token after the first, likewise: below 1 is faster. Behind
            long prompts it tells of decoding, while tokens/s also count the prefill.
            None where some load gave single tokens alone.
        verdict: The ratio beside that of the control, a second server without
            speculation, under the same load. None for these two, without a control,
            and after a single round.
        counts: Acceptance over all rounds.
        output_tokens: Of all answers, over all rounds.
        prefix_hits: Prompt tokens found in the prefix cache, over all rounds.
        same_texts: Answers that are those of the side without speculation.
        texts: Answers in all.
    """

    side: str
    load: str
    tokens_per_s: Spread
    ratio: Spread
    ttft_ratio: Spread
    tpot_ratio: Spread | None
    verdict: Verdict | None
    counts: AcceptanceCounts
    output_tokens: int
    prefix_hits: int
    same_texts: int
    texts: int


def lines_of(plan: Plan, records: Iterable[Record]) -> list[Line]:
    """A line for each load and side, in the plan's order."""
    by_position: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: record.round):
        by_position.setdefault((record.load, record.side), []).append(record)
    return [
        _line(
            by_position[load.name, side.name],
            by_position[load.name, PLAIN],
            by_position.get((load.name, CONTROL)),
        )
        for load in plan.loads
        for side in plan.sides
    ]


def _line(own: list[Record], plain: list[Record], control: list[Record] | None) -> Line:
    pairs = list(zip(own, plain, strict=True))
    texts = [
        one == other
        for record, base in pairs
        for one, other in zip(record.result.texts, base.result.texts, strict=True)
    ]
    ratio, verdict = _ratio(own, plain), None
    # A single round of the control has no range to be within.
    if control and len(control) > 1 and own[0].side not in (PLAIN, CONTROL):
        verdict = ratio.verdict_beside(_ratio(control, plain))
    return Line(
        side=own[0].side,
        load=own[0].load,
        tokens_per_s=Spread.of([record.result.tokens_per_s for record in own]),
        ratio=ratio,
        ttft_ratio=Spread.of([r.result.ttft_ms / b.result.ttft_ms for r, b in pairs]),
        tpot_ratio=_tpot_ratio([(r.result, b.result) for r, b in pairs]),
        verdict=verdict,
        counts=sum((record.counts for record in own), AcceptanceCounts(0, 0, ())),
        output_tokens=sum(record.result.output_tokens for record in own),
        prefix_hits=sum(record.prefix_hits for record in own),
        same_texts=sum(texts),
        texts=len(texts),
    )


def _ratio(own: list[Record], plain: list[Record]) -> Spread:
    """Of tokens/s, within each round."""
    pairs = zip(own, plain, strict=True)
    return Spread.of([r.result.tokens_per_s / b.result.tokens_per_s for r, b in pairs])


def _tpot_ratio(pairs: Sequence[tuple[LoadResult, LoadResult]]) -> Spread | None:
    if not all(plain.tpot_ms for _, plain in pairs):
        return None
    return Spread.of([own.tpot_ms / plain.tpot_ms for own, plain in pairs])


def best_schedule(
    sides: Sequence[Side], ratios: dict[tuple[str, int], float], margin: float = 0.03
) -> list[tuple[int, int, int]]:
    """The number of tokens for each batch size, from what was measured.

    Between two measured batch sizes, those of the larger hold: drafting pays off less
    the more requests there are.

    Args:
        sides: One drafter with several numbers of tokens.
        ratios: Median ratio to no speculation, by (side, concurrency).
        margin: What drafting must gain at least; below it no token is drafted.

    Returns:
        (first batch size, last, tokens) without gaps from 1 on, as vLLM's
        ``num_speculative_tokens_per_batch_size`` takes it.
    """
    schedule: list[tuple[int, int, int]] = []
    first = 1
    for batch in sorted({batch for _, batch in ratios}):
        best = max(sides, key=lambda side: ratios[side.name, batch])
        gain = ratios[best.name, batch] - 1
        tokens = (best.num_speculative_tokens or 0) if gain >= margin else 0
        if schedule and schedule[-1][2] == tokens:
            schedule[-1] = (schedule[-1][0], batch, tokens)
        else:
            schedule.append((first, batch, tokens))
        first = batch + 1
    return schedule


def speed_record(
    machine: Mapping[str, str],
    plan: Plan,
    lines: Sequence[Line],
    side: str,
    schedule: Sequence[tuple[int, int, int]] = (),
    steps: Sequence[StepRow] = (),
) -> SpeedRecord:
    """What a drafter's card says of one side.

    Args:
        machine: With ``device``, ``versions`` and ``environment``.
        plan: What was measured.
        lines: What came of it.
        side: The name of the one that the card is about.
        schedule: The calibration, if the side has one.
        steps: What `step_rows` gave.
    """
    batches = {load.name: load.concurrency for load in plan.loads_of(CONCURRENCY)}
    controls = {line.load: line.ratio for line in lines if line.side == CONTROL}
    rows = []
    for line in lines:
        if line.side == side and line.load in batches:
            control = controls.get(line.load)
            rows.append(
                SpeedRow(
                    requests=batches[line.load],
                    ratio=line.ratio.median,
                    low=line.ratio.low,
                    high=line.ratio.high,
                    acceptance_length=line.counts.acceptance_length,
                    control=(control.low, control.high) if control else None,
                )
            )
    return SpeedRecord(
        device=machine["device"],
        versions=machine["versions"],
        environment=machine["environment"],
        dtype=plan.dtype,
        compiled=not plan.enforce_eager,
        rounds=plan.rounds,
        fresh_servers=plan.fresh_servers,
        schedule=list(schedule),
        rows=rows,
        steps=list(steps),
    )


def step_rows(drafter: str, profiles: Sequence[StepProfile]) -> list[StepRow]:
    """What a drafter's draft and step took beside a step without.

    Args:
        drafter: Its name.
        profiles: Of it, of no speculation, and maybe of others.
    """
    return [
        StepRow(
            requests=profile.batch,
            tokens=profile.tokens,
            draft=found.draft,
            step=found.step,
        )
        for profile in profiles
        if profile.drafter == drafter and (found := beside_plain(profile, profiles))
    ]
