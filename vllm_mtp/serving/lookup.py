# SPDX-License-Identifier: Apache-2.0
"""Drafts from a request's own text, where its end stands there before (n-gram lookup).

As vLLM's ``ngram`` method and prompt lookup decoding (transformers), but the text is
indexed once, token by token, so that a step costs microseconds whatever the length, and
the newest of the longest matches is taken.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

LEAST, MOST = 2, 8
"""Tokens that must stand there before, and at which a match counts as long enough."""

_TRIED = 16  # places at most, the newest first


class Match(NamedTuple):
    """What followed the last tokens where they stood before."""

    length: int  # matching tokens, `LEAST` to `MOST`
    tokens: list[int]


class Lookup:
    """The index of one request's text."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        # For each pair of neighbours, the newest index of its second token; and for
        # each index, the one before with the same pair (-1 for none).
        self._newest: dict[int, int] = {}  # one int per pair takes least room
        self._before: list[int] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add the text's next tokens."""
        for token in tokens:
            earlier = -1
            if self._tokens:
                pair = self._tokens[-1] << 32 | token
                earlier = self._newest.get(pair, -1)
                self._newest[pair] = len(self._tokens)
            self._before.append(earlier)
            self._tokens.append(token)

    def match(self, num_tokens: int) -> Match | None:
        """The newest of the longest matches, and ``num_tokens`` tokens behind it.

        A text that repeats itself with a period shorter than that goes on so.
        """
        text = self._tokens
        best_length, best_end = 0, -1
        end = self._before[-1] if text else -1
        for _ in range(_TRIED):
            if end < 0 or best_length == MOST:
                break
            length = LEAST
            while length < MOST and length <= end:
                if text[end - length] != text[-1 - length]:
                    break
                length += 1
            if length > best_length:
                best_length, best_end = length, end
            end = self._before[end]
        if best_end < 0:
            return None
        period = len(text) - 1 - best_end
        behind = text[best_end + 1 : best_end + 1 + num_tokens]
        while len(behind) < num_tokens:
            behind.append(behind[len(behind) - period])
        return Match(best_length, behind)


class Lookups:
    """The indexes of the requests that are answered."""

    def __init__(self) -> None:
        self._of_request: dict[str, tuple[Lookup, int]] = {}  # and the prompt's length

    def matches(
        self, texts: Mapping[str, tuple[Sequence[int], Sequence[int]]], num_tokens: int
    ) -> dict[str, Match]:
        """For those whose text ends as it went before.

        Args:
            texts: Prompt and answer of all requests, by name; other requests are
                forgotten.
            num_tokens: To find behind a match.
        """
        known, self._of_request = self._of_request, {}
        found = {}
        for name, (prompt, answer) in texts.items():
            lookup, prompt_len = known.get(name, (Lookup(), -1))
            # In a streaming session the prompt grows, and the answer begins anew.
            if prompt_len != len(prompt) or len(lookup) > prompt_len + len(answer):
                lookup = Lookup()
                lookup.extend(prompt)
            self._of_request[name] = lookup, len(prompt)
            lookup.extend(answer[len(lookup) - len(prompt) :])
            match = lookup.match(num_tokens)
            if match is not None:
                found[name] = match
        return found
