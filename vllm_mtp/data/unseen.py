# SPDX-License-Identifier: Apache-2.0
"""ShareGPT prompts that a drafter was not trained on.

Two things tell such a prompt. Its hash decides its side of the split, in every data set
(`split.is_held_out`), and the held-out side is never trained on. And a drafter that
started from no other has seen only the part of ShareGPT that its data were made from.
A drafter's provenance has the data of its last run alone; of one that went on from
another, only the split by hash can tell anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_mtp.data.prompts import read_prompts
from vllm_mtp.data.settings import SourceSettings
from vllm_mtp.data.split import is_held_out

SHAREGPT = "sharegpt"


@dataclass(frozen=True)
class TrainingPrompts:
    """What is known of the prompts that a drafter was trained on.

    Attributes:
        drafter: Its name.
        held_out: The part of all prompts that the split by hash kept from training; 1
            for an untrained drafter, None where nothing is known.
        read: Numbers of the ShareGPT prompts that all of its training read; None where
            they are not known, or another source was read too.
        assumed: Whether runs before the last, of which nothing is known, are taken to
            have held out the same.
    """

    drafter: str
    held_out: float | None
    read: range | None = None
    assumed: bool = False

    def may_hold(self, number: int, identifier: str) -> bool:
        """Whether a ShareGPT prompt may have been trained on.

        Args:
            number: Among `generate`'s ShareGPT prompts.
            identifier: What `prompt_id` gave.
        """
        if self.held_out is None or is_held_out(identifier, self.held_out):
            return False
        return self.read is None or number in self.read

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
    limit: int, known: Sequence[TrainingPrompts], *, max_chars: int = 2000
) -> list[str]:
    """ShareGPT prompts that none of these drafters was trained on, in the file's order.

    Args:
        limit: Most prompts; fewer where there are no more.
        known: Of each drafter. One of which nothing is known rules out no prompt.
        max_chars: Longest prompt to keep, in characters.

    Raises:
        DemoPackageError: ShareGPT's package is missing.
    """
    found: list[str] = []
    # The numbers are those of `generate`, so its filters come first.
    for number, prompt in enumerate(read_prompts(SourceSettings(prompts=SHAREGPT))):
        if len(found) == limit:
            break
        text = prompt.messages[-1]["content"]
        if len(text) <= max_chars and not any(
            one.may_hold(number, prompt.identifier) for one in known
        ):
            found.append(text)
    return found


def choice_in_words(known: Sequence[TrainingPrompts]) -> str:
    """What a report says of `unseen_prompts`."""
    described = "; ".join(one.described() for one in known)
    return f"of ShareGPT, not trained on ({described})" if described else "of ShareGPT"
