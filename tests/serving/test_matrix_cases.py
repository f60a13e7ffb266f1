# SPDX-License-Identifier: Apache-2.0
"""Which cases of the matrix are run, without an engine."""

from collections import Counter
from itertools import groupby

from tests.pairs import pairs_of
from tests.serving.conftest import DRAFTERS as TINY_DRAFTERS
from tests.serving.lossless.cases import (
    DRAFTERS,
    EVERY_RUN,
    FAMILIES,
    RUNNERS,
    WHOLE,
    Case,
    engine_of,
)
from tests.serving.lossless.rows import ENGINES, ROWS


def _is_slow(case: Case) -> bool:
    family = FAMILIES[case.family]
    return family.slow or case.drafter in family.more


def test_every_two_values_that_may_meet_do_so_in_every_run() -> None:
    allowed = [case for case in WHOLE if not _is_slow(case)]
    wanted = {pair for case in allowed for pair in pairs_of(case)}
    assert {pair for case in EVERY_RUN for pair in pairs_of(case)} == wanted
    assert not EVERY_RUN - set(allowed)


def test_every_value_is_in_the_whole() -> None:
    assert len(WHOLE) == len(set(WHOLE)) > 2 * len(EVERY_RUN)
    axes = ({row.name for row in ROWS}, set(DRAFTERS), set(FAMILIES), set(RUNNERS))
    assert tuple(map(set, zip(*WHOLE, strict=True))) == axes
    assert {row.engine for row in ROWS} == set(ENGINES)
    usual = {row.name for row in ROWS if row.engine in ("default", "tight")}
    in_every_run = [set(values) for values in zip(*EVERY_RUN, strict=True)]
    assert in_every_run[0] == axes[0] >= usual
    assert in_every_run[3] == axes[3]


def test_names_tell_cases_apart() -> None:
    assert Counter(map(str, WHOLE)).most_common(1)[0][1] == 1


def test_an_engine_is_started_once() -> None:
    """Else its cases stand apart, and the plain side with them."""
    starts = [key for key, _ in groupby(WHOLE, engine_of)]
    assert len(starts) == len(set(starts))


def test_drafters_are_those_of_the_engine_tests() -> None:
    tokens = {name: tokens for name, (_, tokens, _) in TINY_DRAFTERS.items()}
    for name, (num_draft_tokens, _) in DRAFTERS.items():
        assert tokens.get(name, 4) == num_draft_tokens
