# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp train``."""

import logging
import shlex
from dataclasses import dataclass
from typing import ClassVar

from vllm_mtp.cli.next_steps import checked_line, served_line
from vllm_mtp.cli.targets import target_folder
from vllm_mtp.interrupts import advise
from vllm_mtp.training.arguments import DrafterTrainingArguments


@dataclass(kw_only=True)
class Train(DrafterTrainingArguments):
    """Train a drafter on a frozen target's own answers, with transformers' Trainer:
    `vllm-mtp train SETTINGS.yaml`, flags, or both (flags win). `--output-dir` becomes
    the drafter's folder. `--resume-from-checkpoint last` goes on where a killed run
    left its last checkpoint. Several GPUs: `torchrun --standalone --nproc_per_node
    8 -m vllm_mtp.cli.main train SETTINGS.yaml`."""

    takes_yaml: ClassVar[bool] = True
    # argparse's own names 150 flags above the one line that says what is wrong.
    usage: ClassVar[str] = "%(prog)s [SETTINGS.yaml] [--flags ...]  (--help: which)"

    def run(self) -> int:
        from vllm_mtp.drafter.checkpoint import read_config
        from vllm_mtp.training.run import train

        if self.process_index:
            _be_quiet()
        else:
            self._be_heard()
        advise(
            "with --resume-from-checkpoint last it goes on from the last checkpoint in "
            f"{self.output_dir}"
        )
        metrics = train(self, target_folder(self.target))
        if self.process_index:
            return 0  # the first process says it for all
        positions = [v for k, v in metrics.items() if "teacher_forced_position" in k]
        print(
            f"teacher-forced length on held-out text: "
            f"{metrics['eval_teacher_forced_length']:.3f} (bonus token included; not "
            "the acceptance length of decoding); by position "
            + " ".join(f"{rate:.3f}" for rate in positions)
        )
        folder = str(self.output_dir)
        config = read_config(folder)
        in_vllm = "" if config.unserved else " --in-vllm"
        print(
            f"drafter written to {folder}\n"
            + checked_line(config, folder, self.target)
            + f"measure its acceptance length:  vllm-mtp eval {shlex.quote(folder)} "
            f"--target {shlex.quote(self.target)} --data {shlex.join(self.data)}"
            f"{in_vllm}\n" + served_line(config, folder, self.target)
        )
        return 0

    def _be_heard(self) -> None:
        """Where nobody has set logging up, it shows warnings alone."""
        logger = logging.getLogger("vllm.mtp_placeholder")
        is_chosen = self.log_level != "passive"
        logger.setLevel(self.get_process_log_level() if is_chosen else logging.INFO)
        if not logger.hasHandlers():
            logger.addHandler(logging.StreamHandler())


def _be_quiet() -> None:
    """The first process says it for all, but for errors."""
    import datasets
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("vllm.mtp_placeholder").setLevel(logging.ERROR)
