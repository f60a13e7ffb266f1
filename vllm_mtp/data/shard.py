# SPDX-License-Identifier: Apache-2.0
"""One of several equal parts of a source's prompts, for as many processes."""

import re
from dataclasses import dataclass

_FORM = re.compile(r"([1-9][0-9]*)/([1-9][0-9]*)")


@dataclass(frozen=True)
class Shard:
    """Every ``of``-th prompt, so that a source in some order gives equal parts.

    It is counted behind the duplicates, which would otherwise be in two parts. The side
    of the split has nothing to do with it: see `split.is_held_out`.

    Attributes:
        number: Which one, from 1 on.
        of: How many there are.
    """

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str | None) -> "Shard":
        """Read ``3/8``; None is all.

        Raises:
            ValueError: It is something else.
        """
        if text is None:
            return cls()
        found = _FORM.fullmatch(text)
        if found is None or int(found[1]) > int(found[2]):
            raise ValueError(
                "expected such as 3/8, for the third of eight parts: the first number "
                "is 1 to the second"
            )
        return cls(int(found[1]), int(found[2]))

    def holds(self, index: int) -> bool:
        """Whether a prompt is in it, by its place among the different ones."""
        return index % self.of == self.number - 1
