# SPDX-License-Identifier: Apache-2.0
"""A warning of runs that end before what they teach is what was asked for."""

import logging
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from vllm_mtp.training.arguments import DrafterTrainingArguments

logger = logging.getLogger("vllm.mtp_placeholder.training")


class WarnOfTooFewSteps(TrainerCallback):
    """Says so at the start, when the number of steps is known.

    A run of a few steps may be meant to try a recipe, so it is not refused.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **_: Any
    ) -> None:
        assert isinstance(args, DrafterTrainingArguments)
        most = args.train_places or args.num_speculative_tokens
        name, last = args.plan().schedule.last_change(most)
        if last < state.max_steps:
            return
        what = (
            f"never teaches all {most} positions"
            if name == "curriculum_steps"
            else "never comes to the loss that the weights say"
        )
        logger.warning(
            "%s: got %d, with which a run of %d steps %s (step %d would be the first); "
            "lower it, or raise max_steps (stage_steps in a stage)",
            name,
            getattr(args, name),
            state.max_steps,
            what,
            last + 1,
        )
