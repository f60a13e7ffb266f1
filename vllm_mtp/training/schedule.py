# SPDX-License-Identifier: Apache-2.0
"""What a run teaches changes on the way: which loss, and how many positions.

Both follow from the optimizer's step alone, so a resumed run goes on with the same.
"""

from dataclasses import dataclass, replace

from vllm_mtp.training.objective import Objective

# Positions that a curriculum begins with. The first one alone would teach nothing where
# it is the target's own.
_FIRST_POSITIONS = 2


@dataclass(frozen=True)
class Schedule:
    """When what is taught.

    Attributes:
        ce_start_steps: For so many optimizer steps the loss is cross-entropy alone.
            Total variation has hardly a gradient where a drafter is far from its target
            (LK losses, arXiv 2602.23881).
        curriculum_steps: Begin with two positions and teach one more after every so
            many steps (Uno, arXiv 2609.04010, lets its blocks grow); 0 teaches all
            from the start.

    A stage of a run counts its steps anew, and so each goes through all of this.
    """

    ce_start_steps: int = 0
    curriculum_steps: int = 0

    def objective(self, stated: Objective, step: int) -> Objective:
        """The objective of a step.

        Args:
            stated: The one that a run ends with.
            step: The optimizer's, from 0.
        """
        if step >= self.ce_start_steps:
            return stated
        return replace(stated, ce=1.0, kl=0.0, tv=0.0, acceptance=0.0)

    def positions(self, most: int, step: int) -> int:
        """How many positions are taught in a step.

        Args:
            most: How many in the end.
            step: The optimizer's, from 0.
        """
        if not self.curriculum_steps:
            return most
        return min(most, _FIRST_POSITIONS + step // self.curriculum_steps)

    def last_change(self, most: int) -> tuple[str, int]:
        """What comes last, and the step from which on nothing changes any more.

        Args:
            most: How many positions are taught in the end.
        """
        changes = [
            ("ce_start_steps", self.ce_start_steps),
            ("curriculum_steps", self.curriculum_steps * (most - _FIRST_POSITIONS)),
        ]
        return max(changes, key=lambda change: change[1])
