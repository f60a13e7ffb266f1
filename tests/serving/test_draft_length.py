# SPDX-License-Identifier: Apache-2.0
"""The chosen number of drafts, on made-up machines with made-up texts."""

from dataclasses import dataclass

import numpy as np
import pytest

from vllm_mtp.serving.draft_length import Acceptance, DraftLength, Outcome, Plan, Times

MOST = 4


@dataclass(frozen=True)
class Machine:
    """What steps take, in milliseconds.

    Attributes:
        step: The target's, with no row at all.
        row: More for each row.
        draft: A draft, with no row at all.
        draft_row: More for each row.
        noise: Standard deviation of all times, relative.
    """

    step: float
    row: float
    draft: float
    draft_row: float
    noise: float = 0.02

    def step_ms(self, batch: int, num_drafts: int) -> float:
        return self.step + self.row * (batch + num_drafts)

    def draft_ms(self, batch: int, num_tokens: int) -> float:
        return self.draft + self.draft_row * batch * num_tokens


AMX = Machine(step=23, row=0.4, draft=6, draft_row=0.1)
FEW_ROWS = Machine(step=17, row=1.0, draft=8, draft_row=0.5)


class Play:
    """A machine that serves ``batch`` requests for ever, and what came of it.

    Args:
        machine: What it takes.
        rates: How likely a draft is accepted, on average; the drafter says the truth.
        seed: Of all chance.
    """

    def __init__(self, machine: Machine, *, rates: float = 0.6, seed: int = 0) -> None:
        self.machine, self.rates = machine, rates
        self.random = np.random.default_rng(seed)
        self.chooser = DraftLength(MOST)
        self.now = 0.0
        self.verified: dict[str, int] = {}
        self.truth: dict[str, np.ndarray] = {}
        self.drafted: list[int] = []  # by step
        self.copied: list[int] = []  # requests, by step
        self.num_verified = 0
        # How many requests match, and how likely a copied token is right.
        self.matching, self.copies = 0.0, 0.0
        self.most = MOST  # that requests ask for

    def run(self, batch: int, steps: int) -> float:
        """Tokens per millisecond."""
        names = [f"request {index}" for index in range(batch)]
        start, tokens = self.now, 0
        for _ in range(steps):
            num_drafts = sum(self.verified.get(name, 0) for name in names)
            self.num_verified += num_drafts
            self.pass_time(self.machine.step_ms(batch, num_drafts))
            outcomes = {name: self.outcome(name) for name in names}
            tokens += sum(1 + outcome.accepted for outcome in outcomes.values())
            self.chooser.step_is_over(self.now, outcomes)
            plan = self.chooser.plan(self.now, names, batch, self.matches(names))
            k, self.verified = plan.num_tokens, dict(plan.copied)
            self.copied.append(len(plan.copied))
            self.truth = {name: np.full(MOST, self.copies) for name in plan.copied}
            if k:
                drafted = plan.drafted
                k = min(k, self.most)
                self.pass_time(self.machine.draft_ms(len(drafted), k))
                sure, unsure = 3 * self.rates, 3 * (1 - self.rates)
                likely = self.random.beta(sure, unsure, (len(drafted), k))
                self.truth |= dict(zip(drafted, likely, strict=True))
                lengths = self.chooser.tokens_to_verify(drafted, likely, batch)
                self.verified |= dict(zip(drafted, lengths, strict=True))
            self.drafted.append(k)
            self.chooser.draft_is_over(self.now, names)
        return tokens / (self.now - start)

    def matches(self, names: list[str]) -> dict[str, int]:
        lucky = self.random.random(len(names)) < self.matching
        return {name: 3 for name, match in zip(names, lucky, strict=True) if match}

    def pass_time(self, ms: float) -> None:
        self.now += ms * max(0.5, self.random.normal(1, self.machine.noise))

    def outcome(self, name: str) -> Outcome:
        verified = self.verified.get(name, 0)
        if not verified:
            return Outcome(0, 0)
        lucky = self.random.random(verified) < self.truth[name][:verified]
        return Outcome(verified, int(lucky.cumprod().sum()))


def fixed(machine: Machine, batch: int, k: int, rates: float) -> float:
    """Expected tokens per millisecond with k tokens in every step."""
    tokens = batch * sum(rates**n for n in range(k + 1))
    draft = machine.draft_ms(batch, k) if k else 0
    return tokens / (machine.step_ms(batch, batch * k) + draft)


@pytest.mark.parametrize("machine", [AMX, FEW_ROWS])
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("rates", [0.05, 0.3, 0.6, 0.9])
def test_it_is_as_fast_as_the_best_fixed_number(
    machine: Machine, batch: int, rates: float
) -> None:
    play = Play(machine, rates=rates)
    play.run(batch, 20)
    found = play.run(batch, 300)
    best = max(fixed(machine, batch, k, rates) for k in range(MOST + 1))
    # What chance gives in 300 steps, and what the trials cost.
    assert found > 0.95 * best


@pytest.mark.parametrize("batch", [1, 8, 16])
def test_where_no_draft_is_accepted_next_to_nothing_is_drafted(batch: int) -> None:
    play = Play(FEW_ROWS, rates=0.01)
    play.run(batch, 400)
    assert sum(k > 0 for k in play.drafted[20:]) <= 6
    assert MOST in play.drafted[:3], "it was tried"


def test_a_size_beside_a_known_one_tries_little() -> None:
    play = Play(FEW_ROWS, rates=0.05)
    play.run(8, 200)
    play.drafted.clear()
    play.run(16, 100)
    assert sum(k > 0 for k in play.drafted) <= 3


def test_it_follows_the_text() -> None:
    play = Play(FEW_ROWS, rates=0.02)
    play.run(4, 300)
    assert not any(play.drafted[-30:])
    play.rates = 0.9
    play.run(4, 600)
    assert sum(k > 0 for k in play.drafted[-50:]) >= 45


def test_it_follows_the_machine() -> None:
    play = Play(AMX, rates=0.6)
    play.run(8, 300)
    assert all(play.drafted[-8:])
    play.machine = Machine(step=5, row=2, draft=20, draft_row=1)
    play.run(8, 600)
    assert sum(play.drafted[-50:]) <= 2 * MOST


def test_the_less_a_row_gains_the_fewer_are_verified() -> None:
    kept = []
    for row in (0.0, 1.5):
        play = Play(Machine(20, row, 1, 0.0), rates=0.5)
        play.run(8, 200)
        play.num_verified, play.drafted = 0, []
        play.run(8, 100)
        kept.append(play.num_verified / (8 * sum(play.drafted)))
    assert kept[0] > 0.97
    assert 0.1 < kept[1] < 0.9


@pytest.mark.parametrize("batch", [1, 8])
def test_what_repeats_is_copied_and_not_drafted(batch: int) -> None:
    alone = Play(FEW_ROWS, rates=0.6)
    alone.run(batch, 50)
    play = Play(FEW_ROWS, rates=0.6)
    play.matching, play.copies = 0.5, 0.95
    play.run(batch, 50)
    assert play.run(batch, 300) > 1.1 * alone.run(batch, 300)
    assert sum(play.copied[-300:]) > 0.4 * 300 * batch


def test_a_text_that_does_not_repeat_itself_as_it_seems_is_not_copied() -> None:
    play = Play(FEW_ROWS, rates=0.6)
    play.matching, play.copies = 1.0, 0.05
    play.run(4, 400)
    assert sum(play.copied[-200:]) < 0.2 * 200 * 4
    play.copies = 0.95
    play.run(4, 1500)
    assert sum(play.copied[-200:]) > 0.8 * 200 * 4


def test_where_drafting_does_not_pay_what_repeats_is_still_copied() -> None:
    play = Play(FEW_ROWS, rates=0.02)
    play.matching, play.copies = 0.3, 0.95
    play.run(8, 300)
    assert sum(play.drafted[-100:]) <= 2 * MOST
    assert sum(play.copied[-100:]) > 0.2 * 100 * 8


def test_a_modest_drafter_is_found_out() -> None:
    """One that is right and says that it is not: what it says must not be believed."""
    acceptance = Acceptance()
    said = np.full((1, 1), 0.15)
    assert acceptance.of(said)[0, 0] == pytest.approx(0.15)
    for _ in range(100):
        acceptance.add(0.15, True)
    assert acceptance.of(said)[0, 0] > 0.8


def test_a_step_with_a_prompt_says_nothing_about_decoding() -> None:
    chooser = DraftLength(MOST)
    chooser.step_is_over(0, {"a": Outcome(99, 99)})
    chooser.draft_is_over(1, ["a"])
    for outcomes in ({"a": Outcome(0, 0), "b": Outcome(70, 70)}, {"a": Outcome(3, 3)}):
        chooser.step_is_over(500, outcomes)
        chooser.draft_is_over(501, ["a"])
    assert not chooser._plain.known
    assert not chooser._rows.known
    chooser.step_is_over(520, {"a": Outcome(0, 0)})
    assert chooser._plain.of(1) == pytest.approx(19, rel=0.01)


def test_a_pause_is_no_step() -> None:
    play = Play(AMX)
    play.run(1, 50)
    play.now += 60_000
    play.run(1, 40)
    assert play.chooser._plain.of(1) < 1.2 * AMX.step_ms(1, 0)
    assert play.chooser._rows.of(4) < 10


def test_a_pause_is_no_draft() -> None:
    play = Play(AMX)
    play.run(1, 50)
    play.chooser.step_is_over(play.now, {"a": Outcome(0, 0)})
    play.chooser.plan(play.now, ["a"], 1, {})
    play.chooser.tokens_to_verify(["a"], np.full((1, MOST), 0.5), 1)
    play.chooser.draft_is_over(play.now + 60_000, ["a"])
    play.now += 60_000
    play.run(1, 20)
    assert all(play.drafted[-5:])


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_requests_that_ask_for_fewer_are_drafted_for(most: int, batch: int) -> None:
    play = Play(AMX, rates=0.8)
    play.most = most
    found = play.run(batch, 400)
    best = max(fixed(AMX, batch, k, 0.8) for k in range(most + 1))
    assert found > 0.93 * best
    play.rates = 0.01  # trials go on where nothing is drafted
    play.run(batch, 600)
    assert sum(play.drafted[-100:]) <= 3 * MOST


def test_where_no_step_is_without_drafts_drafts_are_made_all_the_same() -> None:
    """As where a request with a seed, which always has drafts, is in every batch."""
    chooser, drafted, now = DraftLength(MOST), 0, 0.0
    for _ in range(60):
        now += 25
        chooser.step_is_over(now, {"a": Outcome(2, 1), "seeded": Outcome(4, 2)})
        plan = chooser.plan(now, ["a"], 2, {})
        names = [*plan.drafted, "seeded"]
        chooser.tokens_to_verify(names, np.full((len(names), MOST), 0.7), 2)
        drafted += len(plan.drafted)
        chooser.draft_is_over(now + 5, ["a", "seeded"])
    assert drafted >= 40


def test_nobody_to_try_with_is_no_trial() -> None:
    play = Play(AMX)
    play.run(2, 40)
    before = play.chooser._trials_of(2).step
    for _ in range(50):
        assert play.chooser.plan(play.now, [], 2, {}) == Plan(0, [], {})
    assert play.chooser._trials_of(2).step == before


def test_tokens_of_a_prompt_are_no_accepted_drafts() -> None:
    """A request thrown out of the cache has an answer, and reads its prompt again."""
    play = Play(AMX)
    play.run(1, 40)
    verified = play.chooser._acceptance._verified.sum()
    play.chooser.plan(play.now, ["a"], 1, {})
    play.chooser.tokens_to_verify(["a"], np.full((1, MOST), 0.5), 1)
    play.chooser.draft_is_over(play.now, ["a"])
    play.chooser.step_is_over(play.now + 20, {"a": Outcome(63, 63)})
    assert play.chooser._acceptance._verified.sum() == verified


def test_times_are_a_line() -> None:
    times = Times([8, 16], [1e-4, 0.05, 0.05])
    for batch in (1, 3, 8):
        for drafts in (4, 7, 20):
            times.add(10 + 2 * batch + 0.5 * drafts, batch, drafts)
    assert times.of(5, 10) == pytest.approx(25, rel=0.05)
    assert times.slope(1) == pytest.approx(0.5, rel=0.2)
