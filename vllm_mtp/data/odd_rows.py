# SPDX-License-Identifier: Apache-2.0
"""Rows of a source that cannot be used: skipped and counted, or the end of the run."""

from collections import Counter

from vllm_mtp.errors import DataError

_LONGEST = 400  # characters


class OddRowError(DataError):
    """One row cannot be used.

    Args:
        reason: The kind of fault, the same words for every row that has it.
        where: The row's place, such as ``prompts.jsonl, line 3``.
        detail: What was got, and what to do.
    """

    def __init__(self, reason: str, where: str, detail: str) -> None:
        reason, detail = _line(reason), _line(detail)
        super().__init__(f"{where}: {reason}: {detail}")
        self.reason = reason
        self.where = where
        self.detail = detail


def _line(text: str) -> str:
    """What can be printed and kept as JSON, whatever the row has: rows are quoted."""
    whole = text.encode("utf-8", "backslashreplace").decode()
    return " ".join(whole.split())[:_LONGEST]


class OddRows:
    """Counts rows that are skipped, by reason.

    Args:
        strict: Raise at the first one, and skip none.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self._counts: Counter[str] = Counter()
        self._first: dict[str, OddRowError] = {}

    def skip(self, error: OddRowError) -> None:
        """Count one row.

        Raises:
            OddRowError: The same, where the first odd row ends the run.
        """
        if self._strict:
            raise error
        self.note(error)

    def note(self, error: OddRowError) -> None:
        """Count one row that is left out, and is no reason to end the run."""
        self._counts[error.reason] += 1
        self._first.setdefault(error.reason, error)

    @property
    def counts(self) -> dict[str, int]:
        """Rows by reason, most first."""
        return dict(self._counts.most_common())

    def explained(self) -> list[str]:
        """One line per reason, with the first row's place and what it has."""
        return [
            f"{count:,} x {reason} (first: {first.where}: {first.detail})"
            for reason, count in self.counts.items()
            for first in [self._first[reason]]
        ]
