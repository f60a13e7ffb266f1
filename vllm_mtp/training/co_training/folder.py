# SPDX-License-Identifier: Apache-2.0
"""What is written of a drafter that is trained beside its target."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.checkpoint import save_drafter
from vllm_mtp.drafter.target_facts import weights_fingerprint
from vllm_mtp.evaluation.probe import PROBE_FILE, write_probe
from vllm_mtp.files import writing
from vllm_mtp.sharing.folder import describe_folder
from vllm_mtp.sharing.made_with import (
    GitState,
    device_name,
    git_state,
    versions,
)
from vllm_mtp.sharing.provenance import (
    DrafterProvenance,
    ParentRecord,
    TargetRecord,
    TrainingRecord,
    target_record,
)
from vllm_mtp.training.co_training.settings import CoTrainingSettings
from vllm_mtp.training.states import TrainingInputError

STATE_FILE = "drafter_state.pt"
"""Of a checkpoint: the drafter's weights as they are trained, and its optimizer's."""


@dataclass(frozen=True)
class Story:
    """How the drafter came to be what it is.

    Attributes:
        trainer: Of the target.
        settings: Of the drafter's training.
        parent: What it started from, if that was a folder.
        started: With a time zone.
        optimizer_steps: Of the drafter, before a resume too.
        resumed_from_step: Of the trainer.
    """

    trainer: Any
    settings: CoTrainingSettings
    parent: ParentRecord | None
    started: datetime
    optimizer_steps: int
    resumed_from_step: int

    def provenance(self, target: TargetRecord) -> DrafterProvenance:
        args, (packages, commit) = self.trainer.args, _made_with()
        started, finished = (
            moment.astimezone(timezone.utc).replace(microsecond=0)
            for moment in (self.started, datetime.now(timezone.utc))
        )
        return DrafterProvenance(
            target=target,
            training=TrainingRecord(
                arguments=self.settings.model_dump(mode="json"),
                device=device_name(args.device, args.world_size),
                started=started,
                finished=finished,
                wall_seconds=(finished - started).total_seconds(),
                resumed_from_step=self.resumed_from_step,
                optimizer_steps=self.optimizer_steps,
                beside=name_of(self.trainer),
            ),
            parent=self.parent,
            versions=packages,
            git=commit,
        )


@cache
def _made_with() -> tuple[dict[str, str], GitState | None]:
    """Of this process. To look at every package takes seconds, which checkpoints would
    each cost."""
    return versions(), git_state()


def name_of(trainer: Any) -> str:
    """Such as ``SFTTrainer of trl 1.16.0``."""
    kind = type(trainer)
    package = kind.__module__.partition(".")[0]
    try:
        return f"{kind.__name__} of {package} {version(package)}"
    except PackageNotFoundError:  # a class of the user's own
        return kind.__name__


def write_folder(
    folder: Path,
    target: Path | None,
    bound: BoundDrafter,
    story: Story,
    texts: Sequence[Mapping[str, Any]],
) -> Path:
    """Write a drafter's folder, with its probe and its papers.

    Args:
        folder: Where to.
        target: The folder that its target was just saved to; None for none. One that
            holds only an adapter of peft is none of a target.
        bound: The drafter on the target that it goes with.
        story: For its papers.
        texts: For the probe, as `LossModule` takes them; without any, it has none.
    """
    drafter = bound.drafter
    facts, record = drafter.config.target, TargetRecord(name=drafter.config.target.name)
    if target is not None and (target / "config.json").is_file():
        made_of = {"weights_fingerprint": weights_fingerprint(target)}
        facts = facts.model_copy(update=made_of)
        drafter.config = drafter.config.model_copy(update={"target": facts})
        record = target_record(facts, target, str(facts.name))
        record = record.model_copy(update={"name": facts.name})
    (folder / PROBE_FILE).unlink(missing_ok=True)  # of the weights before
    save_drafter(drafter, folder)
    if texts:
        rows = [{**text, "input_ids": text["input_ids"].tolist()} for text in texts]
        write_probe(folder, bound, rows)
    describe_folder(folder, story.provenance(record))
    return folder


def write_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Keep beside a checkpoint what its drafter's training goes on from."""
    path = checkpoint / STATE_FILE
    with writing(path, RuntimeError):  # torch.save's word for a full disk
        torch.save(state, path)


def read_state(checkpoint: Path, config: str) -> dict[str, Any]:
    """What `write_state` wrote.

    Args:
        checkpoint: Its folder.
        config: The drafter's config as JSON, which must be the same.

    Raises:
        TrainingInputError: There is none, or it is another drafter's.
    """
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise TrainingInputError(
            f"co_train: {path}: no such file, so the checkpoint was written without "
            "co_train (or with save_only_model); resume from another one, or train "
            "without resume_from_checkpoint"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found, expected = json.loads(state["config"]), json.loads(config)
    except Exception as error:  # of pickle, zip and torch
        raise TrainingInputError(
            f"co_train: {path}: cannot be read ({type(error).__name__}); resume from "
            "another checkpoint"
        ) from None
    for key, value in expected.items():
        if found.get(key) != value:
            raise TrainingInputError(
                f"co_train: {path}: {key}: the checkpoint's drafter has "
                f"{found.get(key)}, this one {value}; give the drafter that the run "
                "began with"
            )
    return state
