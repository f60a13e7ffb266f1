# SPDX-License-Identifier: Apache-2.0
"""Run rows without and with a drafter, and compare."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.serving.async_scheduling import force_async_scheduling
from tests.serving.engines import (
    core_of,
    counters,
    engine,
    kv_block_sizes,
    num_kv_blocks,
    watched_steps,
)
from tests.serving.lossless.plays import Answer, Stage
from tests.serving.lossless.rows import ENGINES, Engine, Row
from tests.serving.lossless.subjects import MAX_MODEL_LEN, Subject
from vllm_mtp.evaluation.equality import Comparison, compare_greedy
from vllm_mtp.metrics import AcceptanceCounts

LOGPROB_MARGIN = 1e-3
"""Largest difference of one token's logprob in float32, in nats: verifying several
rows at once takes other kernel shapes than decoding one."""


LEAST_DRAFTS = 20
"""With fewer, a row says little of drafting, however well its answers agree."""


@dataclass(frozen=True)
class Facts:
    """What one side of a row did besides answering."""

    counts: AcceptanceCounts
    prefix_hits: int  # tokens
    preemptions: int
    preempted_twice: int  # requests
    chunked: int  # steps that left a prompt unfinished
    mixed: int  # steps with both prompts and decoding
    ended: int  # answers that an end token or a stop ended
    at_limit: int  # answers that filled the context


@dataclass(frozen=True)
class Side:
    """One side of a row."""

    answers: list[Answer]
    facts: Facts
    num_blocks: int  # size of the engine's KV pool
    block_sizes: tuple[int, ...]  # of the KV-cache groups, ascending


@dataclass(frozen=True)
class Result:
    """One row, compared."""

    subject: Subject
    row: Row
    plain: Side
    drafted: Side
    comparisons: list[Comparison]

    def num(self, verdict: str) -> int:
        """How many answers are ``equal``, a ``tie`` or ``different``."""
        return sum(c.verdict == verdict for c in self.comparisons)

    @property
    def has_few_drafts(self) -> bool:
        """Whether the row shows answers, but hardly any drafting."""
        return self.drafted.facts.counts.drafts < LEAST_DRAFTS

    @property
    def problems(self) -> list[str]:
        """What is not as the row wants it; empty if all is well."""
        return [
            *self._differences(),
            *self._other_cache(),
            *self._missing(),
            *self._rejected(),
        ]

    def _differences(self) -> Iterator[str]:
        for number, found in enumerate(self.comparisons):
            if found.verdict == "different":
                one, other = self.plain.answers[number], self.drafted.answers[number]
                yield f"answer {number}, position {found.position}: {one} != {other}"

    def _other_cache(self) -> Iterator[str]:
        hits = self.plain.facts.prefix_hits, self.drafted.facts.prefix_hits
        spared = "same_hits" in self.subject.spares
        if self.row.same_hits and not spared and hits[0] != hits[1]:
            yield f"prefix-cache hits: {hits[0]} tokens, with the drafter {hits[1]}"
        sizes = self.plain.num_blocks, self.drafted.num_blocks
        if sizes[0] != sizes[1]:
            yield f"KV pool: {sizes[0]} blocks, with the drafter {sizes[1]}"
        kinds = {self.plain.block_sizes, self.drafted.block_sizes}
        usual = not {"block_size", "kv_cache_dtype"} & set(self._engine.settings)
        if len(kinds) > 1 or (usual and kinds != {self.subject.block_sizes}):
            yield f"cache blocks of {kinds}, not of {self.subject.block_sizes}"

    def _missing(self) -> Iterator[str]:
        for name, side in (("plain", self.plain), ("drafted", self.drafted)):
            for fact in self.row.shows:
                if not getattr(side.facts, fact) and fact not in self.subject.spares:
                    yield f"{name}: no {fact}"
        wanted = self.row.drafts and (self.subject.exact or not self.row.trims)
        if wanted and not self.drafted.facts.counts.drafts:
            yield "nothing was drafted"

    def _rejected(self) -> Iterator[str]:
        counts = self.drafted.facts.counts
        if not (self.row.first and counts.drafts):
            return
        accepted = counts.accepted_per_position[0]
        if accepted < self.subject.least_accepted * counts.drafts:
            yield f"first position: only {accepted} of {counts.drafts} accepted"
        rejected = counts.drafts - accepted
        if self.subject.exact and not rejected <= self.excused < counts.drafts / 2:
            yield (
                f"first position: {rejected} of {counts.drafts} drafts rejected, "
                f"{self.excused} excused"
            )

    @property
    def excused(self) -> int:
        """Drafts of a drafter that is the target whose first token may be wrong.

        Where a block of several positions passes the limit, its rows read a little
        less of the prefix (`layout.lay_out`): one draft per request. A request that
        was thrown out may find all but one token in the prefix cache; vLLM pads its
        step with drafts that no drafter has made.
        """
        facts = self.drafted.facts
        # In float32 two tokens of a random target are as close once in some hundreds.
        rounded = -(-facts.counts.drafts // 250)
        if self.subject.tie_margin:
            # In bfloat16, rows are rounded by how many there are, and with AMX own
            # layers compute in 8 bits (`serving.kernels`).
            rounded = facts.counts.drafts // 50
            if torch.cpu._is_amx_tile_supported():
                rounded = 1 + facts.counts.drafts // 20
        cut = facts.at_limit if self.subject.num_draft_tokens > 1 else 0
        return cut + facts.preemptions + rounded

    @property
    def _engine(self) -> Engine:
        return ENGINES[self.row.engine]


class Runs:
    """Runs rows of one target, with whatever drafters; the target alone is run once
    for all rows whose engines differ in nothing that it sees.

    Args:
        rows: All that will be asked for.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = list(rows)
        self._plain: dict[str, dict[str, Side]] = {}

    def compared(self, subject: Subject, rows: Iterable[Row]) -> Iterator[Result]:
        """Run rows with the subject's drafter; those of one engine share it."""
        by_engine: dict[str, list[Row]] = {}
        for row in rows:
            by_engine.setdefault(row.engine, []).append(row)
        for name, group in by_engine.items():
            plain = self._alone(subject, ENGINES[name])
            drafted = _run_group(subject, ENGINES[name], group, drafted=True)
            for row, side in zip(group, drafted, strict=True):
                one = plain[row.name]
                comparisons = compare(one, side, subject.tie_margin)
                yield Result(subject, row, one, side, comparisons)

    def _alone(self, subject: Subject, kind: Engine) -> dict[str, Side]:
        if kind.plain not in self._plain:
            rows = [r for r in self._rows if ENGINES[r.engine].plain == kind.plain]
            sides = _run_group(subject, kind, rows, drafted=False)
            self._plain[kind.plain] = {
                row.name: side for row, side in zip(rows, sides, strict=True)
            }
        return self._plain[kind.plain]


def compare(plain: Side, drafted: Side, tie_margin: float) -> list[Comparison]:
    """Compare every answer: tokens, text, why it ended, logprobs."""
    pairs = zip(plain.answers, drafted.answers, strict=True)
    return [_compare(one, other, tie_margin) for one, other in pairs]


def alike(one: Answer, other: Answer) -> bool:
    """Whether a user sees the same: tokens, text, why it ended, logprobs."""
    return _compare(one, other, 0.0).verdict == "equal"


def _compare(one: Answer, other: Answer, tie_margin: float) -> Comparison:
    found = compare_greedy(
        one.token_ids, one.logprobs or (), other.token_ids, tie_margin=tie_margin
    )
    if found.verdict != "equal":
        return found
    same_end = (one.text, one.finish_reason, one.stop_reason) == (
        (other.text, other.finish_reason, other.stop_reason)
    )
    same_logprobs = tie_margin > 0 or (
        _alike(one.logprobs, other.logprobs)
        and _alike(one.prompt_logprobs, other.prompt_logprobs)
    )
    return Comparison("equal" if same_end and same_logprobs else "different")


def _alike(one: Any, other: Any) -> bool:
    """Whether two lists of vLLM's logprobs by token say the same."""
    if one is None or other is None:
        return one is other
    return all(
        a is b or (a is not None and b is not None and _close(a, b))
        for a, b in zip(one, other, strict=True)
    )


def _close(one: Mapping[int, Any], other: Mapping[int, Any]) -> bool:
    # Which of the tokens that are not allowed are named is chance.
    a, b = (
        {token: p.logprob for token, p in of.items() if p.logprob > -math.inf}
        for of in (one, other)
    )
    return a.keys() == b.keys() and all(abs(a[t] - b[t]) < LOGPROB_MARGIN for t in a)


def _run_group(
    subject: Subject, kind: Engine, rows: Iterable[Row], *, drafted: bool
) -> list[Side]:
    spec = subject.spec | dict(kind.spec or {}) if drafted else None
    settings = {"max_model_len": MAX_MODEL_LEN} | subject.settings | dict(kind.settings)
    if kind.few_blocks:
        settings["num_gpu_blocks_override"] = subject.few_blocks
    # Only our side is scheduled ahead: the target alone needs no second check.
    ahead = kind.scheduled_ahead and drafted
    with _scheduling(ahead), engine(subject.target, spec, **settings) as llm:
        stage = Stage(llm, subject)
        return [_run_row(stage, row) for row in rows]


@contextmanager
def _ahead() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        force_async_scheduling(monkeypatch)
        yield


def _scheduling(ahead: bool) -> AbstractContextManager[None]:
    return _ahead() if ahead else nullcontext()


def _run_row(stage: Stage, row: Row) -> Side:
    # Whatever ran before, a row finds an empty prefix cache.
    assert stage.llm.reset_prefix_cache()
    before = counters(stage.llm)
    with watched_steps(stage.llm) as steps, _preemptions(stage) as preempted:
        answers = row.play(stage)
    counts, hits, preemptions = (
        after - was for after, was in zip(counters(stage.llm), before, strict=True)
    )
    facts = Facts(
        counts=counts,
        prefix_hits=hits,
        preemptions=preemptions,
        preempted_twice=sum(times > 1 for times in preempted.values()),
        chunked=sum(step.chunked for step in steps),
        mixed=sum(step.prompts > 0 and step.decoding > 0 for step in steps),
        ended=sum(a.finish_reason in ("stop", "repetition") for a in answers),
        at_limit=sum(answer.num_tokens == MAX_MODEL_LEN for answer in answers),
    )
    sizes = num_kv_blocks(stage.llm), kv_block_sizes(stage.llm)
    return Side(answers, facts, *sizes)


@contextmanager
def _preemptions(stage: Stage) -> Iterator[Mapping[str, int]]:
    """How often each request was thrown out."""
    scheduler, times = core_of(stage.llm).scheduler, Counter[str]()
    preempt = scheduler._preempt_request

    def counted(request: Any, *args: Any, **kwargs: Any) -> Any:
        times[request.request_id] += 1
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    try:
        yield times
    finally:
        scheduler._preempt_request = preempt
