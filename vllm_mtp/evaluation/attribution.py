# SPDX-License-Identifier: Apache-2.0
"""Which tokens of an answer were accepted drafts, and which are the target's.

A step of the target that gives m tokens has accepted m - 1 drafts, at positions 1 to
m - 1, and adds one token of its own. Only the last step can be another one: where the
answer ends within the drafts, the target's token is cut off. So the number of accepted
drafts, as vLLM counts them, decides there.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_mtp.metrics import AcceptanceCounts

_CUT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
        text: What it adds. Empty where it only begins a character, or has no text.
        position: Of the accepted draft, from 1; 0 for the target's own token.
    """

    text: str
    position: int


@dataclass(frozen=True)
class Answer:
    """An answer as it came.

    Attributes:
        question: The user's message.
        steps: The tokens that each step of the target gave.
    """

    question: str
    steps: tuple[tuple[Token, ...], ...]

    @property
    def by_position(self) -> dict[int, int]:
        """Tokens at each position, in order; 0 is the target's own."""
        counted = Counter(token.position for step in self.steps for token in step)
        return dict(sorted(counted.items()))


@dataclass(frozen=True)
class StepRecord:
    """What an engine gave for one request.

    Attributes:
        token_ids: The answer.
        step_sizes: Tokens of each step.
        counts: Drafts of this request alone.
    """

    token_ids: list[int]
    step_sizes: list[int]
    counts: AcceptanceCounts


def attribute(
    question: str, record: StepRecord, decode: Callable[[Sequence[int]], str]
) -> Answer:
    """Say of each token where it came from.

    Args:
        question: The user's message.
        record: Of its request.
        decode: The text of token ids from the answer's start.
    """
    texts = iter(_texts(record.token_ids, decode))
    places = _positions(record.step_sizes, record.counts.accepted_tokens)
    steps = (tuple(Token(next(texts), place) for place in step) for step in places)
    return Answer(question, tuple(steps))


def _positions(step_sizes: Sequence[int], accepted: int) -> list[list[int]]:
    steps = [[*range(1, size), 0] for size in step_sizes]
    if steps:
        left = accepted - sum(size - 1 for size in step_sizes[:-1])
        if left >= step_sizes[-1]:
            steps[-1] = list(range(1, step_sizes[-1] + 1))
    return steps


def _texts(
    token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> list[str]:
    """What each token adds to the text; a character goes to the token that ends it."""
    texts, shown = [], ""
    for end in range(1, len(token_ids) + 1):
        text = decode(token_ids[:end])
        if end < len(token_ids):
            text = text.rstrip(_CUT_CHARACTER)  # the next token may complete it
        texts.append(text[len(shown) :])
        shown = max(shown, text, key=len)
    return texts
