# SPDX-License-Identifier: Apache-2.0
"""Run rows without and with the drafter, and compare."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest

from tests.serving.async_scheduling import force_async_scheduling
from tests.serving.engines import core_of, counters, engine, watched_steps
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


@dataclass(frozen=True)
class Side:
    """One side of a row."""

    answers: list[Answer]
    facts: Facts


@dataclass(frozen=True)
class Result:
    """One row, compared."""

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
        return [*self._differences(), *self._missing()]

    def _differences(self) -> Iterator[str]:
        for number, found in enumerate(self.comparisons):
            if found.verdict == "different":
                one, other = self.plain.answers[number], self.drafted.answers[number]
                yield f"answer {number}, position {found.position}: {one} != {other}"
        hits = self.plain.facts.prefix_hits, self.drafted.facts.prefix_hits
        if self.row.same_hits and hits[0] != hits[1]:
            yield f"prefix-cache hits: {hits[0]} tokens, with the drafter {hits[1]}"

    def _missing(self) -> Iterator[str]:
        for name, side in (("plain", self.plain), ("drafted", self.drafted)):
            for fact in self.row.shows:
                if not getattr(side.facts, fact):
                    yield f"{name}: no {fact}"
        if self.row.drafts and not self.drafted.facts.counts.drafts:
            yield "nothing was drafted"


def run_rows(subject: Subject, rows: Iterable[Row]) -> Iterator[Result]:
    """Run rows; those with the same engine settings share two engines."""
    by_engine: dict[str, list[Row]] = {}
    for row in rows:
        by_engine.setdefault(row.engine, []).append(row)
    for name, group in by_engine.items():
        plain = _run_group(subject, ENGINES[name], group, drafted=False)
        drafted = _run_group(subject, ENGINES[name], group, drafted=True)
        for row, one, other in zip(group, plain, drafted, strict=True):
            yield Result(row, one, other, compare(one, other, subject.tie_margin))


def compare(plain: Side, drafted: Side, tie_margin: float) -> list[Comparison]:
    """Compare every answer: tokens, text, why it ended, logprobs."""
    pairs = zip(plain.answers, drafted.answers, strict=True)
    return [_compare(one, other, tie_margin) for one, other in pairs]


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
        a is b
        or (
            a.keys() == b.keys()
            and all(abs(a[t].logprob - b[t].logprob) < LOGPROB_MARGIN for t in a)
        )
        for a, b in zip(one, other, strict=True)
    )


def _run_group(
    subject: Subject, kind: Engine, rows: Iterable[Row], *, drafted: bool
) -> list[Side]:
    spec = subject.spec | dict(kind.spec or {}) if drafted else None
    settings = {"max_model_len": MAX_MODEL_LEN} | subject.settings | dict(kind.settings)
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
        ended=sum(answer.finish_reason == "stop" for answer in answers),
    )
    return Side(answers, facts)


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
