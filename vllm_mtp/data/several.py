# SPDX-License-Identifier: Apache-2.0
"""The answers of several folders as one data set to train on."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_mtp.data.served_sampling import in_use, penalties_of
from vllm_mtp.data.settings import RunSettings
from vllm_mtp.data.store import (
    HELD_OUT,
    SPLITS,
    TRAIN,
    read_provenance,
    read_split,
    require_made_by,
)
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Answers:
    """What was read.

    Attributes:
        train: Rows with the columns of `data.store`. Of several folders the rows are in
            the order of the prompts' hashes, so that the first so many are of all.
        held_out: Likewise.
        settings: How each folder was made.
        dropped: Rows of ``train`` that were left out, since another folder holds the
            prompt out, or the one that its side of the split hangs on.
    """

    train: "Dataset"
    held_out: "Dataset"
    settings: tuple[RunSettings, ...]
    dropped: int = 0


def read_answers(
    folders: Sequence[str | os.PathLike[str]], facts: TargetFacts, target: Path
) -> Answers:
    """Read folders of one target's answers.

    A prompt's side follows from a hash and the share that is held out, so equal prompts
    and those of one conversation can only be on two sides where the shares differ.

    Args:
        folders: What ``vllm-mtp generate --out`` wrote; at least one.
        facts: The target's.
        target: Its folder.

    Raises:
        DataError: A folder is not ours, not finished, another target's or named twice,
            or a split has no rows in any of them.
    """
    _require_different(folders)
    for folder in folders:
        require_made_by(folder, facts, target=target)
    settings = tuple(read_provenance(folder).settings for folder in folders)
    if len(folders) == 1:
        train, held_out = (read_split(folders[0], split) for split in SPLITS)
        return Answers(train, held_out, settings)
    train, held_out = (_together(folders, split) for split in (TRAIN, HELD_OUT))
    unseen = set(held_out["prompt_id"]) | set(_split_ids(held_out))
    both = zip(train["prompt_id"], _split_ids(train), strict=True)
    kept = [number for number, ids in enumerate(both) if unseen.isdisjoint(ids)]
    if not kept:
        raise DataError(
            f"data: every prompt to train on is held out in another one of "
            f"{', '.join(map(str, folders))}; generate them with the same --held-out"
        )
    dropped = len(train) - len(kept)
    return Answers(train.select(kept), held_out, settings, dropped)


def _split_ids(rows: "Dataset") -> list[str]:
    """What each row's side hangs on; folders of earlier versions do not say it."""
    own = list(rows["prompt_id"])
    if "split_id" not in rows.column_names:
        return own
    return [name or other for name, other in zip(rows["split_id"], own, strict=True)]


def read_rows(
    folders: Sequence[str | os.PathLike[str]],
    split: str,
    facts: TargetFacts,
    target: Path,
) -> "Dataset":
    """Read one split of all folders.

    Args:
        folders: What ``vllm-mtp generate --out`` wrote; at least one.
        split: ``"train"`` or ``"held_out"``.
        facts: The target's.
        target: Its folder.

    Returns:
        The rows; of several folders in the order of the prompts' hashes.

    Raises:
        DataError: As in `read_answers`; or answers were sampled otherwise than others,
            so that one measure would not fit all.
    """
    _require_different(folders)
    for folder in folders:
        require_made_by(folder, facts, target=target)
    if len(folders) == 1:
        return read_split(folders[0], split)
    first, *others = [_to_measure(folder) for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        if other != first:
            raise DataError(
                f"--data {folder}: its answers were made with {other}, those of "
                f"{folders[0]} with {first}; evaluate them one by one"
            )
    return _together(folders, split)


def _to_measure(folder: str | os.PathLike[str]) -> str:
    """What says how drafts are compared with answers, in words."""
    settings = read_provenance(folder).settings
    values = {"temperature": settings.sampling.temperature}
    values |= penalties_of(settings.sampling)
    told = ", ".join(f"{name} {value}" for name, value in values.items())
    return f"{told}, {settings.policy}"


def _require_different(folders: Sequence[str | os.PathLike[str]]) -> None:
    seen: set[str] = set()
    for folder in folders:
        if (real := os.path.realpath(Path(folder).expanduser())) in seen:
            raise DataError(f"data: {folder} is named twice; name it once")
        seen.add(real)


def _together(folders: Sequence[str | os.PathLike[str]], split: str) -> "Dataset":
    """The rows of one split that any of the folders has."""
    from datasets import concatenate_datasets

    parts = [
        read_split(folder, split)
        for folder in folders
        # A small shard may hold nothing out.
        if read_provenance(folder).splits[split].rows
    ]
    if not parts:
        raise DataError(
            f"data: none of {', '.join(map(str, folders))} has rows in the split "
            f"{split!r}; generate with more prompts, or with another --held-out"
        )
    rows = concatenate_datasets(parts)
    names = list(rows["prompt_id"])
    return rows.select(sorted(range(len(rows)), key=names.__getitem__))


def differences(
    folders: Sequence[str | os.PathLike[str]], settings: Sequence[RunSettings]
) -> list[str]:
    """Say which folders hold other text than the first one, and why.

    Args:
        folders: As the user named them.
        settings: How each was made.
    """
    first, lines = _of_text(settings[0]), []
    for folder, other in zip(folders[1:], map(_of_text, settings[1:]), strict=True):
        # Answers that were given were not sampled, so there is nothing to compare.
        keys = dict.fromkeys([*first, *other])
        if first["policy"] != other["policy"]:
            keys = {key: None for key in first if key in other}
        found = [
            f"{key} {other.get(key)!r} (there {first.get(key)!r})"
            for key in keys
            if first.get(key) != other.get(key)
        ]
        if found:
            lines.append(
                f"{folder}: made with other settings than {folders[0]}: "
                f"{', '.join(found)}; the drafter learns both kinds of text"
            )
    return lines


def _of_text(settings: RunSettings) -> dict[str, Any]:
    """The settings that show in the text: sampling, but for its seed, and template."""
    names = in_use(settings.sampling.temperature)
    sampling = {name: getattr(settings.sampling, name) for name in names}
    if settings.is_off_policy:  # nothing was sampled
        sampling = {}
    sampling["policy"] = settings.policy
    names = ("chat_template", "chat_template_sha256", "chat_template_kwargs")
    return (
        sampling
        | {name: getattr(settings, name) for name in names}
        | {"tokenizer_mode": settings.engine.tokenizer_mode}
        | {"quantization": settings.engine.quantization}
    )
