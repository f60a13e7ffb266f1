# SPDX-License-Identifier: Apache-2.0
"""``provenance.json``: how a drafter was made. No paths, users or hosts in it."""

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from vllm_mtp.data.settings import Provenance as Generation
from vllm_mtp.data.settings import SourceSettings
from vllm_mtp.data.sources import OF_SHAREGPT, is_self
from vllm_mtp.data.store import read_provenance as read_generation
from vllm_mtp.data.unseen import TrainingPrompts
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.target_facts import TargetFacts, weights_sample_sha256
from vllm_mtp.errors import CheckpointError
from vllm_mtp.sharing.made_with import GitState, git_state, versions
from vllm_mtp.sharing.names import (
    cached_revision,
    is_repo_id,
    public_text,
    public_value,
)
from vllm_mtp.sharing.peft_folder import Adapter

PROVENANCE_FILE = "provenance.json"

_M = TypeVar("_M", bound=BaseModel)


class Record(BaseModel):
    """What a drafter's folder says in a JSON file: nothing unknown, all finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TargetRecord(Record):
    """The target: names for people, hashes for the rest."""

    name: str | None = Field(default=None, description="Hub name or folder's name.")
    revision: str | None = Field(default=None, description="The hub's commit.")
    license: str | None = Field(default=None, description="From the target's card.")
    weights_fingerprint: str | None = Field(
        default=None, description="See `target.weights_fingerprint`."
    )
    weights_sample_sha256: str | None = Field(
        default=None, description="See `target.weights_sample_sha256`."
    )


class DataRecord(Record):
    """The target's answers that were trained on."""

    name: str = Field(description="The folder's name.")
    generation: Generation = Field(description="Its `generation.json`.")


class ParentRecord(Record):
    """The drafter that training started from."""

    name: str = Field(description="Hub name or folder's name.")
    config_sha256: str = Field(description="Of its `config.json`.")
    weights_sample_sha256: str | None = Field(
        default=None, description="See `target.weights_sample_sha256`."
    )
    held_out: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Part of all prompts, by the split by hash, that none of its "
        "training saw; 1: untrained; null: not known.",
    )


class AdapterRecord(Record):
    """The PEFT adapter that the drafter was imported from."""

    name: str = Field(description="Hub name or folder's name.")
    revision: str | None = Field(default=None, description="The hub's commit.")
    base_model: str | None = Field(
        default=None, description="What it names as its base model."
    )
    peft_version: str | None = Field(default=None, description="Of what wrote it.")
    config_sha256: str = Field(description="Of its `adapter_config.json`.")
    weights_sample_sha256: str | None = Field(
        default=None, description="See `target.weights_sample_sha256`."
    )


class TrainingRecord(Record):
    """One training run."""

    arguments: dict[str, JsonValue] = Field(
        description="The important ones, and all that are not the defaults."
    )
    device: str
    started: AwareDatetime = Field(description="Of the last start, UTC.")
    finished: AwareDatetime
    wall_seconds: float = Field(ge=0, description="Since the last start.")
    resumed_from_step: int = Field(default=0, ge=0, description="0: not resumed.")
    optimizer_steps: int = Field(ge=0)
    beside: str | None = Field(
        default=None,
        description="The trainer that trained the target at the same time, whose "
        "batches it was trained on; null: the target was frozen.",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_a_count_that_nobody_made(cls, values: Any) -> Any:
        # Files of earlier versions have the key, with null.
        if isinstance(values, dict):
            return {key: v for key, v in values.items() if key != "labels_seen"}
        return values


class DrafterProvenance(Record):
    """How a drafter was made."""

    format: Literal[1] = 1
    target: TargetRecord
    data: DataRecord | None = Field(
        default=None, description="null: untrained, or trained beside its target."
    )
    more_data: tuple[DataRecord, ...] = Field(
        default=(), description="Of the other folders, where there were several."
    )
    training: TrainingRecord | None = Field(
        default=None, description="null: untrained."
    )
    parent: ParentRecord | None = Field(default=None, description="null: none.")
    adapter: AdapterRecord | None = Field(
        default=None, description="null: not imported."
    )
    versions: dict[str, str]
    git: GitState | None = Field(
        default=None, description="Of the checkout; null: an installed package."
    )

    @property
    def every_data(self) -> tuple[DataRecord, ...]:
        """Of all folders; none where it is untrained."""
        return (self.data, *self.more_data) if self.data else ()

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def untrained(config: DrafterConfig, target: Path, named: str) -> DrafterProvenance:
    """Of a drafter as `vllm-mtp init` makes it.

    Args:
        config: The drafter's.
        target: The target's folder.
        named: The target as the user named it: a folder or a hub name.
    """
    return DrafterProvenance(
        target=target_record(config.target, target, named),
        versions=versions(),
        git=git_state(),
    )


def imported(
    config: DrafterConfig, target: Path, named: str, adapter: AdapterRecord
) -> DrafterProvenance:
    """Of a drafter as `vllm-mtp import` makes it; see `untrained`."""
    return untrained(config, target, named).model_copy(update={"adapter": adapter})


def adapter_record(
    folder: Path, named: str, adapter: Adapter, revision: str | None
) -> AdapterRecord:
    """Say which adapter it was.

    Args:
        folder: Where it lies.
        named: As the user named it: a folder or a hub name.
        adapter: What the folder holds.
        revision: The hub's commit, if it came from there.
    """
    said = adapter.config
    return AdapterRecord(
        name=named if revision else _name_of(named, folder),
        revision=revision,
        base_model=said.base_model_name_or_path,
        peft_version=said.peft_version,
        config_sha256=adapter.config_sha256,
        weights_sample_sha256=weights_sample_sha256(folder),
    )


def target_record(facts: TargetFacts, folder: Path, named: str) -> TargetRecord:
    """Say which target it was.

    Args:
        facts: The target's.
        folder: Where it lies.
        named: As the user named it: a folder or a hub name.
    """
    return TargetRecord(
        name=_name_of(named, folder),
        revision=cached_revision(str(folder)),
        license=_license_in(folder),
        weights_fingerprint=facts.weights_fingerprint,
        weights_sample_sha256=weights_sample_sha256(folder),
    )


def data_record(folder: Path | str) -> DataRecord:
    """Say which answers they were.

    Raises:
        DataError: The folder is not a finished one of `vllm-mtp generate`.
    """
    return DataRecord(
        name=_folder_name(folder), generation=without_paths(read_generation(folder))
    )


def parent_record(folder: Path, named: str) -> ParentRecord:
    """Say which drafter it started from.

    Args:
        folder: The drafter's.
        named: As the user named it: a folder or a hub name.
    """
    try:
        known = training_prompts(folder)
        held_out = None if known.assumed else known.held_out
    except CheckpointError:  # a hand-edited file must not cost the end of a run
        held_out = None
    return ParentRecord(
        name=_name_of(named, folder),
        held_out=held_out,
        config_sha256=hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        weights_sample_sha256=weights_sample_sha256(folder),
    )


def read_provenance(folder: Path | str) -> DrafterProvenance | None:
    """Read a drafter's ``provenance.json``.

    Returns:
        None where the folder has none.

    Raises:
        CheckpointError: The file is something else.
    """
    path = Path(folder, PROVENANCE_FILE)
    if not path.is_file():
        return None
    try:
        return DrafterProvenance.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: not a provenance that this version of vllm-mtp wrote ({error}); "
            "update vllm-mtp, or remove the file"
        ) from None


def training_prompts(folder: Path | str) -> TrainingPrompts:
    """What a drafter's provenance tells of the prompts that it was trained on.

    Raises:
        CheckpointError: The provenance is something else.
    """
    name, provenance = _folder_name(folder), read_provenance(folder)
    if provenance is None:
        return TrainingPrompts(name, held_out=None)
    parent = provenance.parent
    before = 1.0 if parent is None else parent.held_out
    if provenance.training is not None and provenance.training.beside is not None:
        return TrainingPrompts(name, held_out=None)  # another trainer's data
    if provenance.adapter is not None:
        before = None  # an adapter does not say what it was trained on
    settings = [data.generation.settings for data in provenance.every_data]
    if not settings:
        return TrainingPrompts(name, before)  # as untrained as what it came from
    read = None if parent else _of_sharegpt([each.source for each in settings])
    held_out = min(each.held_out for each in settings)
    if before is None:
        return TrainingPrompts(name, held_out, read, assumed=True)
    return TrainingPrompts(name, min(held_out, before), read)


def _of_sharegpt(
    sources: Sequence[SourceSettings],
) -> tuple[SourceSettings, ...] | None:
    """The parts of ShareGPT that were read; None if another source was read too, but
    for prompts that the target wrote, which nobody asked in ShareGPT."""
    others = [source for source in sources if not is_self(source.prompts)]
    if any(source.prompts not in OF_SHAREGPT for source in others):
        return None
    return tuple(others)


def without_paths(record: _M) -> _M:
    """The record with names in place of paths."""
    clean = public_value(json.loads(record.model_dump_json()))
    return type(record).model_validate_json(json.dumps(clean))


def utc(moment: datetime) -> str:
    """Such as ``2030-01-31 12:00 UTC``."""
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _name_of(named: str, folder: Path) -> str:
    if cached_revision(str(folder)) is not None:
        return public_text(str(folder))
    if is_repo_id(named) and not Path(named).is_dir():
        return named
    return _folder_name(folder)


def _folder_name(folder: Path | str) -> str:
    return Path(os.path.abspath(Path(folder).expanduser())).name


def _license_in(folder: Path) -> str | None:
    """The license that a model's own card names."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        found = ModelCard.load(card).data.get("license")
    except Exception:  # a card that nobody can read
        return None
    return found if isinstance(found, str) else None
