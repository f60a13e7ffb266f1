# SPDX-License-Identifier: Apache-2.0
"""The files that tell about a drafter, beside its config and weights."""

from dataclasses import replace
from pathlib import Path

from vllm_mtp.drafter.checkpoint import read_config, save_drafter
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.errors import DataError
from vllm_mtp.evaluation.offline import OfflineResult
from vllm_mtp.evaluation.report import JSON_FILE as EVALUATION_FILE
from vllm_mtp.evaluation.report import PLOT_FILE, TABLE_FILE
from vllm_mtp.files import write_whole, writing
from vllm_mtp.sharing.card import CARD_FILE, is_made, license_of, make_card
from vllm_mtp.sharing.names import public_value
from vllm_mtp.sharing.provenance import (
    PROVENANCE_FILE,
    DrafterProvenance,
    read_provenance,
    without_paths,
)
from vllm_mtp.sharing.speed import SPEED_FILE, SpeedRecord, read_speed


def write_folder(
    drafter: Drafter,
    folder: Path | str,
    provenance: DrafterProvenance | None = None,
    evaluation: OfflineResult | None = None,
    *,
    license: str | None = None,
) -> Path:
    """Write a drafter and all that is known about it; see `describe_folder`.

    Returns:
        The folder.
    """
    folder = save_drafter(drafter, folder)
    describe_folder(folder, provenance, evaluation, license=license)
    return folder


def describe_folder(
    folder: Path | str,
    provenance: DrafterProvenance | None = None,
    evaluation: OfflineResult | None = None,
    *,
    license: str | None = None,
) -> None:
    """Write ``provenance.json``, ``evaluation.json`` and ``README.md``.

    What is not given is removed where it is there, and so is ``speed.json``: it is
    about other weights. A card that a person wrote stays.

    Args:
        folder: Holds a drafter.
        provenance: How it was made.
        evaluation: Its acceptance.
        license: Of the weights, for the card.
    """
    folder = Path(folder)
    (folder / SPEED_FILE).unlink(missing_ok=True)
    if evaluation is None:
        for name in (EVALUATION_FILE, TABLE_FILE, PLOT_FILE):
            (folder / name).unlink(missing_ok=True)
    else:
        clean = replace(evaluation, settings=public_value(evaluation.settings))
        write_whole(folder / EVALUATION_FILE, clean.to_json())
    if provenance is None:
        (folder / PROVENANCE_FILE).unlink(missing_ok=True)
    else:
        write_whole(folder / PROVENANCE_FILE, without_paths(provenance).to_json())
    write_whole(folder / CARD_FILE, card_text(folder, license=license))


def refresh_card(folder: Path | str) -> None:
    """Make ``README.md`` anew of what the folder holds, such as a new evaluation.

    Raises:
        CheckpointError, DataError: A file of the folder is broken.
    """
    write_whole(Path(folder, CARD_FILE), card_text(folder))


def write_speed(folder: Path | str, speed: SpeedRecord) -> None:
    """Write ``speed.json``, and the card anew.

    Raises:
        MTPError: The folder cannot be written.
    """
    with writing(folder):
        write_whole(Path(folder, SPEED_FILE), speed.to_json())
        refresh_card(folder)


def card_text(
    folder: Path | str, *, repo_id: str | None = None, license: str | None = None
) -> str:
    """What ``README.md`` shall say: a person's text if there is one, else ours.

    Args:
        folder: Holds a drafter.
        repo_id: Where it can be had from; None for from a folder.
        license: Of the weights; default the one of the card that is there.

    Raises:
        CheckpointError, DataError: A file of the folder is broken.
    """
    folder = Path(folder)
    path = folder / CARD_FILE
    before = path.read_text("utf-8") if path.is_file() else None
    if before is not None and not is_made(before):
        return before
    card = make_card(
        read_config(folder),
        read_provenance(folder),
        read_evaluation(folder),
        read_speed(folder),
        name=folder.resolve().name,
        repo_id=repo_id,
        license=license or (license_of(before) if before else None),
    )
    return str(card)


def read_evaluation(folder: Path | str) -> OfflineResult | None:
    """Read a drafter's ``evaluation.json``.

    Returns:
        None where the folder has none.

    Raises:
        DataError: The file is something else.
    """
    path = Path(folder, EVALUATION_FILE)
    if not path.is_file():
        return None
    try:
        return OfflineResult.from_json(path.read_bytes())
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
