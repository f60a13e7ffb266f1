# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a run goes on from."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from vllm_mtp.training.states import TrainingInputError

LAST = "last"


def checkpoint_to_resume(
    wanted: str | None, output_dir: Path, learner: nn.Module
) -> Path | None:
    """Find the checkpoint and make sure that it is this run's.

    Args:
        wanted: A checkpoint's folder, ``"last"`` for the newest whole one in
            ``output_dir`` (none is fine: the run then begins), or None.
        output_dir: The run's folder.
        learner: What was saved.

    Raises:
        TrainingInputError: There is no such checkpoint, or it holds other weights;
            transformers would leave them out without a word.
    """
    if wanted is None:
        return None
    checkpoint = newest_whole(output_dir) if wanted == LAST else Path(wanted)
    if checkpoint is None:
        return None
    weights = checkpoint / SAFE_WEIGHTS_NAME
    if not _is_whole(checkpoint) or not weights.is_file():
        raise TrainingInputError(
            f"resume_from_checkpoint {checkpoint}: no whole checkpoint there; name a "
            f"checkpoint-STEP folder, or {LAST!r} for the newest in output_dir"
        )
    if problems := _differences(weights, learner.state_dict()):
        raise TrainingInputError(
            f"{weights}: not of a drafter with these settings ({problems[0]}, "
            f"{len(problems)} differing tensors); resume with the run's own settings"
        )
    return checkpoint


def newest_whole(output_dir: Path) -> Path | None:
    """The newest checkpoint that a kill did not cut short."""
    found = {
        int(folder.name.partition("-")[2]): folder
        for folder in output_dir.glob("checkpoint-*")
        if folder.name.partition("-")[2].isdigit() and _is_whole(folder)
    }
    return found[max(found)] if found else None


def _is_whole(checkpoint: Path) -> bool:
    # Written last, and not at once.
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _differences(weights: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    with safe_open(weights, framework="pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    wanted = {name: list(tensor.shape) for name, tensor in expected.items()}
    return [
        f"tensor {name!r}: the checkpoint has {found.get(name)}, expected "
        f"{wanted.get(name)}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
