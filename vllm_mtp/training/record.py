# SPDX-License-Identifier: Apache-2.0
"""The end of a training run: its drafter's folder says how it was made."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from vllm_mtp.drafter.checkpoint import read_config
from vllm_mtp.sharing.folder import describe_folder
from vllm_mtp.sharing.made_with import device_name, git_state, versions
from vllm_mtp.sharing.names import public_value
from vllm_mtp.sharing.provenance import (
    DrafterProvenance,
    TrainingRecord,
    data_record,
    parent_record,
    target_record,
)

if TYPE_CHECKING:
    from vllm_mtp.evaluation.offline import OfflineResult
    from vllm_mtp.training.arguments import DrafterTrainingArguments

# Told also where they are the defaults, which may change from version to version.
IMPORTANT = (
    "layers", "num_speculative_tokens", "dtype", "train_only",
    "ce_weight", "kl_weight", "tv_weight", "feature_weight",
    "teacher_tokens", "position_decay", "anchors_per_text", "max_text_tokens",
    "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps",
    "placeholder_lr_scale", "markov_lr_scale",
    "optim", "weight_decay", "max_grad_norm", "bf16", "seed",
)  # fmt: skip
# Told elsewhere in the record, or of this machine and its screen only.
_LEFT_OUT = (
    "target", "data", "warm_start", "output_dir", "resume_from_checkpoint",
    "local_rank", "use_cpu", "run_name", "project", "report_to", "disable_tqdm",
    "debug", "accelerator_config", "remove_unused_columns",
    "do_train", "do_eval", "do_predict",
)  # fmt: skip
_LEFT_OUT_STARTS = ("log", "save_", "hub_", "push_to_hub", "trackio_", "dataloader_")


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What is known at the end of a run.

    Attributes:
        args: The settings; ``args.output_dir`` holds the drafter.
        target: The target's folder.
        started: With a time zone.
        optimizer_steps: Made in all, before a resume too.
        resumed_from_step: Step of the checkpoint that the run went on from.
    """

    args: "DrafterTrainingArguments"
    target: Path
    started: datetime
    optimizer_steps: int
    resumed_from_step: int = 0


def publish_run(
    run: RunInfo,
    *,
    evaluation: "OfflineResult | None" = None,
    license: str | None = None,
) -> DrafterProvenance:
    """Write ``provenance.json``, ``README.md`` and, if given, ``evaluation.json``.

    Args:
        run: What was done; the drafter is saved already.
        evaluation: On held-out text. Without it an older ``evaluation.json`` in the
            folder is removed, since it is about other weights.
        license: Of the weights; default the target's, if its card names one.

    Raises:
        CheckpointError: There is no drafter in the folder.
    """
    folder = Path(str(run.args.output_dir))
    config, parent = read_config(folder), run.args.warm_start
    provenance = DrafterProvenance(
        target=target_record(config.target, run.target, run.args.target),
        data=data_record(run.args.data[0]),
        more_data=tuple(map(data_record, run.args.data[1:])),
        training=_training_record(run),
        parent=parent_record(Path(parent), parent) if parent else None,
        versions=versions(),
        git=git_state(),
    )
    describe_folder(folder, provenance, evaluation, license=license)
    return provenance


def _training_record(run: RunInfo) -> TrainingRecord:
    started, finished = (
        moment.astimezone(timezone.utc).replace(microsecond=0)
        for moment in (run.started, datetime.now(timezone.utc))
    )
    return TrainingRecord(
        arguments=told_arguments(run.args),
        device=device_name(run.args.device, run.args.world_size),
        started=started,
        finished=finished,
        wall_seconds=(finished - started).total_seconds(),
        resumed_from_step=run.resumed_from_step,
        optimizer_steps=run.optimizer_steps,
    )


def told_arguments(args: "DrafterTrainingArguments") -> dict[str, JsonValue]:
    """The important settings, and all that are not the defaults.

    Paths become names, and tokens of accounts are left out.
    """
    values = _as_json(args.to_dict())
    defaults = _as_json({field.name: _default(field) for field in fields(args)})
    told = {
        name: value
        for name, value in values.items()
        if name in IMPORTANT or (_is_told(name) and value != defaults.get(name))
    }
    first = {name: told.pop(name) for name in IMPORTANT if name in told}
    return public_value(first | dict(sorted(told.items())))


def _is_told(name: str) -> bool:
    return not (
        name in _LEFT_OUT
        or name.startswith(_LEFT_OUT_STARTS)
        or name.endswith(("_token", "_key", "_secret"))
    )


def _default(field: "Field[Any]") -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def _as_json(values: Mapping[str, Any]) -> dict[str, JsonValue]:
    def plain(value: Any) -> Any:
        return value.value if isinstance(value, Enum) else str(value)

    return json.loads(json.dumps(dict(values), default=plain))
