# SPDX-License-Identifier: Apache-2.0
"""The end of a run: a folder that can be served, checked and told about."""

import logging
from datetime import datetime
from pathlib import Path

from datasets import Dataset

from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.checkpoint import load_drafter, save_drafter
from vllm_mtp.evaluation.offline import evaluate_texts
from vllm_mtp.evaluation.probe import write_probe
from vllm_mtp.training.arguments import DrafterTrainingArguments
from vllm_mtp.training.loss_module import LossModule
from vllm_mtp.training.record import RunInfo, publish_run

logger = logging.getLogger("vllm.mtp_placeholder.training")


def finish(
    loss_module: LossModule,
    args: DrafterTrainingArguments,
    target: Path,
    held_out: Dataset,
    *,
    started: datetime,
    steps: int,
    checkpoint: Path | None,
) -> None:
    """Write the drafter's folder, ``args.output_dir``.

    It holds config and weights, the probe that `vllm-mtp check` compares with, the
    evaluation of what was written, and the model card.

    Args:
        loss_module: With the trained drafter.
        args: The run's settings.
        target: The target's folder.
        held_out: Texts for the probe and the evaluation.
        started: When the run began, with a time zone.
        steps: Optimizer steps in all.
        checkpoint: What the run went on from.
    """
    folder = save_drafter(loss_module.drafter, str(args.output_dir))
    with args.autocast():
        write_probe(folder, loss_module.bound, held_out)
    logger.info(
        "written to %s; evaluating what was written on %d held-out texts",
        folder,
        len(held_out),
    )
    evaluation = evaluate_texts(
        _as_written(folder, loss_module), held_out, args.num_speculative_tokens
    )
    publish_run(
        RunInfo(
            args=args,
            target=target,
            started=started,
            optimizer_steps=steps,
            resumed_from_step=_step_of(checkpoint),
        ),
        evaluation=evaluation,
    )


def _as_written(folder: Path, loss_module: LossModule) -> BoundDrafter:
    """What was trained in float32 is served in the checkpoint's type."""
    host = loss_module.host
    drafter = load_drafter(folder, dtype=host.model.dtype, device=host.device)
    return BoundDrafter(drafter, host)


def _step_of(checkpoint: Path | None) -> int:
    """The step in a checkpoint's name, ``checkpoint-STEP``."""
    step = "" if checkpoint is None else checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdigit() else 0
