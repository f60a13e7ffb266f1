# SPDX-License-Identifier: Apache-2.0
"""ShareGPT prompts that a drafter was not trained on.

Two things tell such a prompt. Its hash decides its side of the split, in every data set
(`split.is_held_out`), and the held-out side is never trained on. And a drafter that
started from no other has seen only the part of ShareGPT that its data were made from:
the conversations of which a row was read, be it their first turn, a later one or a task
made of an answer.
A drafter's provenance has the data of its last run alone; of one that went on from
another, only the split by hash can tell anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vllm_mtp.data.odd_rows import OddRows
from vllm_mtp.data.prompts import read_prompts
from vllm_mtp.data.settings import SourceSettings
from vllm_mtp.data.sources import SHAREGPT
from vllm_mtp.data.split import is_held_out


@dataclass(frozen=True)
class TrainingPrompts:
    """What is known of the prompts that a drafter was trained on.

    Attributes:
        drafter: Its name.
        held_out: The part of all prompts that the split by hash kept from training; 1
            for an untrained drafter, None where nothing is known.
        read: The parts of ShareGPT that all of its training read; None where they are
            not known, or another source was read too, which may hold any text.
        assumed: Whether runs before the last, of which nothing is known, are taken to
            have held out the same.
    """

    drafter: str
    held_out: float | None
    read: tuple[SourceSettings, ...] | None = None
    assumed: bool = False

    def may_hold(self, split_id: str) -> bool:
        """Whether a conversation of ShareGPT may have been trained on.

        Args:
            split_id: What `Prompt.split_id` gives for its prompts.
        """
        if self.held_out is None or is_held_out(split_id, self.held_out):
            return False
        return self.read is None or split_id in self._conversations

    @cached_property
    def _conversations(self) -> frozenset[str]:
        """What was read, by the prompts that the split hangs on."""
        return frozenset(
            prompt.split_id
            for source in self.read or ()
            # The rows that cannot be used were not trained on.
            for prompt in read_prompts(source, OddRows())
        )

    def described(self) -> str:
        """How an unseen prompt is told, in words."""
        name = f"`{self.drafter}`"
        if self.held_out is None:
            return f"{name}: not known (no provenance.json)"
        if self.held_out == 1:
            return f"{name}: untrained"
        text = f"{name}: the {self.held_out:.2g} held out by hash"
        if self.read is not None:
            text += ", and what its data were not made from"
        if self.assumed:
            text += ", taken to hold for the runs before its last one too"
        return text


def unseen_prompts(
    limit: int,
    known: Sequence[TrainingPrompts],
    *,
    max_chars: int = 2000,
    source: str = SHAREGPT,
) -> list[str]:
    """ShareGPT prompts that none of these drafters was trained on, in the file's order.

    Args:
        limit: Most prompts; fewer where there are no more.
        known: Of each drafter. One of which nothing is known rules out no prompt.
        max_chars: Longest prompt to keep, in characters.
        source: One of ShareGPT's whose prompts have one turn.

    Raises:
        DemoPackageError: ShareGPT's package is missing.
    """
    found: list[str] = []
    for prompt in read_prompts(SourceSettings(prompts=source)):
        if len(found) == limit:
            break
        text = prompt.messages[-1]["content"]
        if len(text) <= max_chars and not any(
            one.may_hold(prompt.split_id) for one in known
        ):
            found.append(text)
    return found


def choice_in_words(known: Sequence[TrainingPrompts], source: str = SHAREGPT) -> str:
    """What a report says of `unseen_prompts`."""
    described = "; ".join(one.described() for one in known)
    name = "of ShareGPT" if source == SHAREGPT else f"of `{source}`"
    return f"{name}, not trained on ({described})" if described else name
