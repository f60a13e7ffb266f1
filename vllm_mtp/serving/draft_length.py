# SPDX-License-Identifier: Apache-2.0
"""How many tokens to draft, and which drafts to verify: what is measured decides.

A step of B requests yields B tokens, and one more for each accepted draft. So with the
time of the target's step, the time of a draft, and how likely each draft is accepted,
tokens per second follow for every number of drafts, 0 included, and the best is taken.
Where a request's text repeats itself (`lookup`), what followed before may be worth more
than a draft, and takes no time. All is learnt while serving, so it follows the machine,
the load and the text.

Nothing here knows vLLM, or reads a clock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_mtp.serving.lookup import LEAST, MOST

_MEMORY = 0.97  # what an older time weighs, from one to the next of its kind
_OUTLIER = 2.0  # times what was expected: the process was kept waiting
_LEAST_GAIN = 1.02  # of tokens per second, to draft rather than not
_BINS = 10  # of probabilities
_TRUST = 8.0  # drafts after which acceptance counts as much as the drafter's own word
_ACCEPTANCE_MEMORY = 0.99
_FADES = 0.8  # what is left of it after a trial
_RECENT = 64  # drafts that stand for those to come
# Steps from one trial of another number to the next: the first, and the last where a
# trial drafts more (and so costs more) or less than what is best.
_FIRST_GAP, _MORE_GAP, _LESS_GAP = 16, 128, 64
_KEPT_STEPS = 8  # for which a choice stands
_PATIENCE = 16  # steps without one that verifies nothing, after which drafts are made
# How likely a copied token is right, by how many tokens matched before it; that is only
# where learning starts.
_MATCHED = dict(
    zip(
        range(LEAST, MOST + 1),
        (0.45, 0.55, 0.65, 0.75, 0.85, 0.85, 0.95),
        strict=True,
    )
)


class Outcome(NamedTuple):
    """What the target's step made of a request's drafts."""

    verified: int
    accepted: int


class Times:
    """Milliseconds as a linear function of a few sizes; the newest weigh most.

    Ridge regression with exponential forgetting. What the observations do not tell
    apart goes to where the ridge is lowest.

    Args:
        scales: Of each size, about.
        ridge: Of the constant, then of each size.
    """

    def __init__(self, scales: Sequence[float], ridge: Sequence[float]) -> None:
        self._scales = np.array((1.0, *scales))
        self._ridge = np.diag(ridge)
        self._products = np.zeros_like(self._ridge)
        self._sums = np.zeros(len(self._scales))
        self._weights: np.ndarray | None = None

    @property
    def known(self) -> bool:
        """Whether anything was observed."""
        return self._weights is not None

    def add(self, ms: float, *sizes: float) -> None:
        """Learn from one observation."""
        row = np.array((1.0, *sizes)) / self._scales
        self._products = self._products * _MEMORY + np.outer(row, row)
        self._sums = self._sums * _MEMORY + row * ms
        self._weights = np.linalg.solve(self._products + self._ridge, self._sums)

    def of(self, *sizes: float) -> float:
        """Expected milliseconds, above 0. More of a size never takes less time, which
        is noise, and far from what was observed might leave nothing."""
        assert self._weights is not None, "asked before anything was observed"
        weights = self._weights.clip(min=(-np.inf, *[0.0] * len(sizes)))
        row = np.array((1.0, *sizes)) / self._scales
        return max(float(weights @ row), 1e-3)

    def slope(self, index: int) -> float:
        """Expected milliseconds for one more of a size, not below 0."""
        assert self._weights is not None, "asked before anything was observed"
        return max(float(self._weights[index + 1] / self._scales[index + 1]), 0.0)


class Acceptance:
    """How likely a draft is accepted, from how likely the drafter says it is."""

    def __init__(self) -> None:
        self._accepted = np.zeros(_BINS)
        self._verified = np.zeros(_BINS)

    def add(self, probability: float, accepted: bool) -> None:
        """Learn from a draft that was verified behind accepted ones."""
        index = min(int(probability * _BINS), _BINS - 1)
        self._accepted[index] *= _ACCEPTANCE_MEMORY
        self._verified[index] *= _ACCEPTANCE_MEMORY
        self._accepted[index] += accepted
        self._verified[index] += 1

    def forget(self) -> None:
        """Believe a little less in what was seen: what is not verified any more would
        never be seen to have changed."""
        self._accepted *= _FADES
        self._verified *= _FADES

    def of(self, probabilities: np.ndarray) -> np.ndarray:
        """Expected acceptance of each, given that those before it are accepted."""
        index = np.minimum((probabilities * _BINS).astype(int), _BINS - 1)
        believed = self._accepted[index] + _TRUST * probabilities
        result: np.ndarray = believed / (self._verified[index] + _TRUST)
        return result


class Plan(NamedTuple):
    """What to do for the requests of a step."""

    num_tokens: int  # to draft for each of the next
    drafted: list[str]
    copied: dict[str, int]  # how many tokens of what followed before


class _Choice(NamedTuple):
    """The best for so many requests, if all are drafted for."""

    num_tokens: int  # for each
    rate: float  # tokens per millisecond
    least: float  # acceptance at which a verified row gains what it costs


@dataclass
class _Trials:
    """When batches of about one size try another number than the best one known."""

    step: int = 0
    next: int = _FIRST_GAP
    gap: int = _FIRST_GAP
    made: int = 0

    def go_on(self) -> None:
        """Try again in the next step."""
        self.next, self.gap = self.step + 1, _FIRST_GAP

    def is_now(self, last_gap: int) -> bool:
        """Whether the step that begins is one; the time between them doubles."""
        self.step += 1
        if self.step < self.next:
            return False
        self.gap = min(2 * self.gap, last_gap)
        self.next, self.made = self.step + self.gap, self.made + 1
        return True


class DraftLength:
    """Chooses for one engine. In each step the runner calls, in this order,
    `step_is_over`, `plan`, `tokens_to_verify` if it drafted, and `draft_is_over`.

    Args:
        most: Most tokens to draft for a request.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        # A step that verifies nothing: B.
        self._plain = Times([8], [1e-4, 0.05])
        # What one takes longer that does: drafts. Unless it is seen otherwise, each
        # row costs alike.
        self._rows = Times([16], [1.0, 1e-3])
        # A draft: tokens per request, all tokens.
        self._draft = Times([most, 16], [1e-4, 0.05, 0.05])
        self._acceptance, self._of_copies = Acceptance(), Acceptance()
        # Of recent drafts, how likely each and all before it are accepted.
        self._recent = np.zeros((0, most))
        self._trials: dict[int, _Trials] = {}
        self._choices: dict[int, tuple[int, _Choice]] = {}  # by B, when made
        self._steps = 0
        # Of the step that goes on.
        self._verifies_all = False
        # What each draft was said to be worth, and who is taken by its word.
        self._proposed: dict[str, tuple[Acceptance, Sequence[float]]] = {}
        self._going: frozenset[str] = frozenset()
        self._drafted: tuple[int, int] | None = None
        self._now: float | None = None
        self._planned_at = 0.0

    def step_is_over(self, now_ms: float, outcomes: Mapping[str, Outcome]) -> None:
        """The target's step has given its tokens.

        Args:
            now_ms: The time, in milliseconds from anywhere.
            outcomes: By request. A token of a prompt counts as verified, and the time
                of a step that read one says nothing about decoding.
        """
        nothing: tuple[Acceptance, Sequence[float]] = (self._acceptance, ())
        only_decoded = outcomes.keys() <= self._going
        for name, outcome in outcomes.items():
            acceptance, probabilities = self._proposed.get(name, nothing)
            if outcome.verified > len(probabilities):  # tokens of a prompt
                only_decoded = False
                continue
            tried = probabilities[: min(outcome.verified, outcome.accepted + 1)]
            for position, probability in enumerate(tried):
                acceptance.add(probability, position < outcome.accepted)
        if self._now is not None and outcomes and only_decoded:
            self._learn(now_ms - self._now, outcomes)
        self._now, self._steps = now_ms, self._steps + 1
        self._proposed, self._drafted = {}, None

    def _learn(self, ms: float, outcomes: Mapping[str, Outcome]) -> None:
        batch = len(outcomes)
        num_drafts = sum(outcome.verified for outcome in outcomes.values())
        if not num_drafts:
            most = _OUTLIER * self._plain.of(batch) if self._plain.known else ms
            self._plain.add(min(ms, most), batch)
        elif self._plain.known:
            plain = self._plain.of(batch)
            # A pause is no step.
            self._rows.add(min(ms, _OUTLIER * plain) - plain, num_drafts)

    def plan(
        self,
        now_ms: float,
        names: Sequence[str],
        batch: int,
        matches: Mapping[str, int],
    ) -> Plan:
        """What to do in this step.

        Now and then it is not the best that is known: the time and the acceptance of
        what is never tried would stay unknown.

        Args:
            now_ms: The time, from which a draft is timed.
            names: Requests that go on.
            batch: B; all requests of the step.
            matches: How many tokens matched, of those whose text repeats itself.
        """
        self._verifies_all, self._planned_at = False, now_ms
        if not names or (not self._plain.known and self._steps < _PATIENCE):
            return Plan(0, [], {})
        if not self._rows.known:
            return Plan(self._most, list(names), {})
        choice, trials = self._choice(batch), self._trials_of(batch)
        if trials.is_now(_LESS_GAP if choice.num_tokens else _MORE_GAP):
            self._of_copies.forget()
            # A batch that drafts tries nothing at all and all that there is, in turns.
            self._verifies_all = choice.num_tokens == 0 or trials.made % 2 == 0
            if self._verifies_all:
                return Plan(self._most, list(names), {})
            return Plan(0, [], {})
        gains, copied = {}, {}
        for name in names:
            if name not in matches:
                continue
            matched = [min(matches[name] + n, MOST) for n in range(self._most)]
            said = [_MATCHED[length] for length in matched]
            together = self._of_copies.of(np.array(said)).cumprod()
            if length := int((together >= choice.least).sum()):
                gains[name], copied[name] = self._gain(together, choice.least), length
                self._proposed[name] = self._of_copies, said
        num_tokens = choice.num_tokens
        if copied and num_tokens:
            # The better of the two for each request, or nothing drafted at all: for few
            # requests a draft takes almost as long as for many.
            yields = self._gain(self._recent[:, :num_tokens], choice.least)
            worse = [name for name, gain in gains.items() if gain < yields]
            num_drafted = len(names) - len(copied) + len(worse)
            if num_drafted:
                ms = self._draft.of(num_tokens, num_drafted * num_tokens)
                gained = num_drafted * yields - choice.rate * ms
                if gained > sum(gains[name] for name in worse):
                    for name in worse:
                        del copied[name]
                else:
                    num_tokens = 0
        if copied and not num_tokens:
            # To verify anything at all takes longer than its rows.
            rows = sum(copied.values())
            ms = self._rows.of(rows) - rows * self._rows.slope(0)
            if sum(gains[name] for name in copied) < choice.rate * ms:
                copied = {}
        drafted = [name for name in names if name not in copied] if num_tokens else []
        return Plan(num_tokens if drafted else 0, drafted, copied)

    @staticmethod
    def _gain(together: np.ndarray, least: float) -> float:
        """Tokens that a draft yields beyond what its rows cost, on average."""
        return float((together - least).clip(min=0).sum(axis=-1).mean())

    def tokens_to_verify(
        self, names: Sequence[str], probabilities: np.ndarray, batch: int
    ) -> list[int]:
        """How many of each request's drafts are worth a row of the target's.

        Args:
            names: Of the R requests that were drafted for.
            probabilities: ``[R, k]``; by the drafter, of each token given those
                before.
            batch: B; all requests of the step, those without drafts included.

        Returns:
            ``[R]``, each from 0 to k.
        """
        num_tokens = probabilities.shape[1]
        self._drafted = len(names), num_tokens
        for name, said in zip(names, probabilities.tolist(), strict=True):
            self._proposed[name] = self._acceptance, said
        together = self._acceptance.of(probabilities).cumprod(axis=1)
        whole = self._extended(together)
        self._recent = np.concatenate([self._recent, whole])[-_RECENT:]
        if not self._rows.known:
            return [num_tokens] * len(names)
        if self._verifies_all:
            drafts_by_now = self._choice(batch).num_tokens > 0
            if not drafts_by_now and self._best(batch, whole).num_tokens:
                # This trial would have paid off: has the text changed?
                self._trials_of(batch).go_on()
            return [num_tokens] * len(names)
        least = self._choice(batch).least
        lengths: list[int] = (together >= least).sum(axis=1).tolist()
        return lengths

    def draft_is_over(self, now_ms: float, names: Sequence[str]) -> None:
        """Nothing more is done for this step.

        Args:
            now_ms: The time.
            names: Of all requests of the step.
        """
        if self._drafted is not None:
            num_reqs, num_tokens = self._drafted
            sizes = num_tokens, num_reqs * num_tokens
            ms = now_ms - self._planned_at
            if self._draft.known:
                ms = min(ms, _OUTLIER * self._draft.of(*sizes))
            self._draft.add(ms, *sizes)
        self._now, self._going = now_ms, frozenset(names)

    def _trials_of(self, batch: int) -> _Trials:
        return self._trials.setdefault((batch - 1).bit_length(), _Trials())

    def _extended(self, together: np.ndarray) -> np.ndarray:
        """Drafts ``[R, k]`` as ``[R, most]``: a short one goes on as those before it
        did, or as one that gets half as likely with each token."""
        known, missing = together.shape[1], self._most - together.shape[1]
        tail = 0.5 ** np.arange(1, missing + 1)
        if len(self._recent):
            means = self._recent.mean(axis=0)
            tail = means[known:] / max(means[known - 1], 1e-6)
        return np.concatenate([together, together[:, -1:] * tail], axis=1)

    def _choice(self, batch: int) -> _Choice:
        made_at, choice = self._choices.get(batch, (-_KEPT_STEPS, None))
        if choice is None or self._steps - made_at >= _KEPT_STEPS:
            choice = self._best(batch, self._recent)
            self._choices[batch] = self._steps, choice
        return choice

    def _best(self, batch: int, together: np.ndarray) -> _Choice:
        """For drafts like these, ``[R, most]``."""
        if not (len(together) and self._plain.known and self._draft.known):
            return _Choice(self._most, 0.0, 0.0)
        row_ms = self._rows.slope(0)
        best, rate = 0, batch / self._plain.of(batch) * _LEAST_GAIN
        for _ in range(2):  # what a row must yield follows from the rate it adds to
            worth = together >= rate * row_ms
            rows = np.cumsum(worth.mean(axis=0))
            accepted = np.cumsum((together * worth).mean(axis=0))
            for num_tokens in range(1, self._most + 1):
                ms = self._plain.of(batch) + self._draft.of(
                    num_tokens, batch * num_tokens
                )
                ms += self._rows.of(batch * rows[num_tokens - 1])
                found = batch * float(1 + accepted[num_tokens - 1]) / ms
                if found > rate:
                    best, rate = num_tokens, found
        return _Choice(best, rate, rate * row_ms)
