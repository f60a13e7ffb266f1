# SPDX-License-Identifier: Apache-2.0
"""A moving average of a drafter's weights, which is what a run then saves.

At a constant learning rate the last step's weights have that step's noise in them;
their average has less, much as if the rate had been lowered (Polyak and Juditsky 1992;
of networks, arXiv 1803.05407).
"""

import logging
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

logger = logging.getLogger("vllm.mtp_placeholder.training")

AVERAGE_FILE = "average.safetensors"


class WeightAverage(TrainerCallback):
    """An exponential moving average, which takes the place of the weights once the
    training is over.

    It has the weights' own types, float32. Until then they stay as the optimizer has
    them, and evaluations on the way measure these.

    Args:
        drafter: Trained in place. In a run of several processes, each makes the same
            average of the same weights.
        decay: How much of the average stays in each step, between 0 and 1.
    """

    def __init__(self, drafter: nn.Module, decay: float) -> None:
        self._drafter = drafter
        self._decay = decay
        average = get_ema_multi_avg_fn(decay)
        # Takes over the weights of the first step as they are.
        self._average = AveragedModel(drafter, multi_avg_fn=average)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Warn of a run that is shorter than what is averaged over."""
        steps = 1 / (1 - self._decay)
        if state.max_steps < steps:
            logger.warning(
                "ema_decay: got %s, which averages over about %.0f steps, but the run "
                "has %d, so much of what is saved is its start; lower it",
                self._decay,
                steps,
                state.max_steps,
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take in the weights that a step has left."""
        self._average.update_parameters(self._drafter)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the average where the weights are."""
        if self._average.n_averaged:
            self._drafter.load_state_dict(self._average.module.state_dict())

    def save(self, folder: Path | str) -> None:
        """Keep it in a checkpoint's folder."""
        save_file(self._average.state_dict(), Path(folder, AVERAGE_FILE))

    def load(self, folder: Path | str) -> None:
        """Go on with what `save` kept."""
        self._average.load_state_dict(load_file(Path(folder, AVERAGE_FILE)))
