# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a run goes on from."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.errors import in_one_line
from vllm_mtp.training.average import AVERAGE_FILE
from vllm_mtp.training.loss_module import LossModule
from vllm_mtp.training.states import TrainingInputError

LAST = "last"
_CONFIG = "drafter.json"
_NEEDED = (_CONFIG, SAFE_WEIGHTS_NAME, OPTIMIZER_NAME, SCHEDULER_NAME)


def write_checkpoint_config(checkpoint: Path | str, config: DrafterConfig) -> None:
    """Keep beside a checkpoint's weights what they are."""
    Path(checkpoint, _CONFIG).write_text(config.model_dump_json(indent=2), "utf-8")


def checkpoint_to_resume(
    wanted: str | None,
    output_dir: Path,
    loss_module: LossModule,
    *,
    averages: bool = False,
) -> Path | None:
    """Find the checkpoint and make sure that it is this run's.

    Args:
        wanted: A checkpoint's folder, ``"last"`` for the newest whole one in
            ``output_dir`` (none is fine: the run then begins), or None.
        output_dir: The run's folder.
        loss_module: What was saved.
        averages: Whether an average of its weights was saved too.

    Raises:
        TrainingInputError: There is no such checkpoint, or it holds other weights;
            transformers would leave them out without a word.
    """
    if wanted is None:
        return None
    checkpoint = newest_whole(output_dir) if wanted == LAST else Path(wanted)
    if checkpoint is None:
        return None
    if not _is_whole(checkpoint):
        raise TrainingInputError(
            f"resume_from_checkpoint {checkpoint}: no whole checkpoint there; name a "
            f"checkpoint-STEP folder, or {LAST!r} for the newest in output_dir"
        )
    try:
        problem = _difference(checkpoint, loss_module)
        if averages:
            problem = problem or _no_average(checkpoint)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise TrainingInputError(
            f"{checkpoint}: cannot be read ({in_one_line(error)}); name "
            "another checkpoint, or begin anew"
        ) from None
    if problem:
        raise TrainingInputError(
            f"{checkpoint}: not of a drafter with these settings ({problem}); resume "
            "with the run's own settings"
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
    if not all((checkpoint / name).is_file() for name in _NEEDED):
        return False
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _difference(checkpoint: Path, loss_module: LossModule) -> str | None:
    """The first thing that the checkpoint has otherwise."""
    found = json.loads((checkpoint / _CONFIG).read_text("utf-8"))
    wanted = json.loads(loss_module.drafter.config.model_dump_json())
    for key, value in wanted.items():
        if found.get(key) != value and key != "target":
            return f"{key}: the checkpoint has {found.get(key)}, this run {value}"
    for key, value in wanted["target"].items():
        if found["target"].get(key) != value and key != "name":
            return f"target.{key}: the checkpoint has {found['target'].get(key)}"
    return _differing_vocabulary(checkpoint, loss_module)


def _no_average(checkpoint: Path) -> str | None:
    file = checkpoint / AVERAGE_FILE
    if not file.exists():
        return "ema_decay: the checkpoint has no average of the weights"
    with safe_open(file, framework="pt"):  # it can be read
        return None


def _differing_vocabulary(checkpoint: Path, loss_module: LossModule) -> str | None:
    # Heads were cut to the vocabulary before the checkpoint is loaded.
    vocab = loss_module.drafter.draft_vocab
    if vocab is None:
        return None
    with safe_open(checkpoint / SAFE_WEIGHTS_NAME, framework="pt") as file:
        found = file.get_tensor("drafter.draft_vocab.token_ids")
    if torch.equal(found, vocab.token_ids.cpu()):
        return None
    return "draft_vocab: other tokens; the training data changed"
