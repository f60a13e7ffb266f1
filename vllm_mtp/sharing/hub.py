# SPDX-License-Identifier: Apache-2.0
"""Save a drafter with all that is known about it, and share it on the hub."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from vllm_mtp.drafter.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_drafter
from vllm_mtp.errors import CheckpointError, MTPError
from vllm_mtp.evaluation.probe import PROBE_FILE
from vllm_mtp.evaluation.report import JSON_FILE as EVALUATION_FILE
from vllm_mtp.evaluation.report import PLOT_FILE
from vllm_mtp.sharing.card import CARD_FILE
from vllm_mtp.sharing.folder import card_text, write_folder
from vllm_mtp.sharing.names import public_text, public_value
from vllm_mtp.sharing.provenance import PROVENANCE_FILE
from vllm_mtp.sharing.speed import SPEED_FILE

if TYPE_CHECKING:
    from vllm_mtp.drafter.model import Drafter
    from vllm_mtp.evaluation.offline import OfflineResult
    from vllm_mtp.sharing.provenance import DrafterProvenance

_MESSAGE = "Upload drafter"


def save_pretrained(
    drafter: "Drafter",
    folder: Path | str,
    *,
    provenance: "DrafterProvenance | None" = None,
    evaluation: "OfflineResult | None" = None,
    license: str | None = None,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    **hub: Any,
) -> Path:
    """Write a drafter's folder with its card, and upload it if asked to.

    Args:
        drafter: Left as it is.
        folder: Made if need be. What it says about a drafter of before is removed.
        provenance: How the drafter was made.
        evaluation: Its acceptance.
        license: Of the weights, for the card.
        push_to_hub: Upload the folder too.
        repo_id: Where to; default the folder's name.
        hub: See `push_to_hub`.

    Returns:
        The folder.

    Raises:
        MTPError: The upload failed, or there are settings for none.
    """
    if not push_to_hub and (repo_id is not None or hub):
        given = ", ".join(["repo_id"] * (repo_id is not None) + sorted(hub))
        raise MTPError(f"{given}: only used with push_to_hub=True; add that")
    folder = write_folder(drafter, folder, provenance, evaluation, license=license)
    if push_to_hub:
        _push(folder, repo_id or folder.resolve().name, **hub)
    return folder


def push_to_hub(
    folder: Path | str,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = _MESSAGE,
    license: str | None = None,
) -> str:
    """Upload a drafter's folder to the Hugging Face hub, in one commit.

    Nothing but our own files is sent, see `files_to_push`.

    Args:
        folder: The drafter's; checked first, and not changed.
        repo_id: ``name`` or ``owner/name``; made if need be.
        private: For a new repository; None for the owner's default.
        revision: Branch; made if need be. None for the main one.
        token: Default the one that `hf auth login` stored.
        commit_message: First line of the commit.
        license: For the card; default the one that it has, or the target's.

    Returns:
        The repository's address.

    Raises:
        CheckpointError: The folder is broken; nothing was sent.
        MTPError: The name is no repository's, or the hub refused.
    """
    return _push(folder, repo_id, private, revision, token, commit_message, license)


def _push(
    folder: Path | str,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = _MESSAGE,
    license: str | None = None,
) -> str:
    files_to_push(folder, repo_id, license=license)  # all that can be wrong here
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
        # Only now is the owner known, whom the card's commands name.
        files = files_to_push(folder, repo.repo_id, license=license)
        api.create_commit(
            repo.repo_id,
            [CommitOperationAdd(name, file) for name, file in files.items()],
            commit_message=commit_message,
            revision=revision,
        )
    except MTPError:
        raise
    except Exception as error:  # the hub client raises many kinds
        raise MTPError(
            f"{repo_id}: the hub did not take the drafter ({type(error).__name__}: "
            f"{error}). Log in with `hf auth login`, and use a name of yours"
        ) from None
    return str(repo)


def files_to_push(
    folder: Path | str, repo_id: str, *, license: str | None = None
) -> dict[str, bytes | Path]:
    """Everything that is shared: name in the repository, and contents or file.

    Never checkpoints, optimizer states or logs. Paths on this machine are taken out of
    the JSON files; a card of ours is made anew.

    Args:
        folder: The drafter's.
        repo_id: ``name`` or ``owner/name``.
        license: For the card.

    Raises:
        CheckpointError: The folder is broken.
        DataError: Its evaluation is broken.
        MTPError: The name is no repository's.
    """
    _require_repo_id(repo_id)
    folder = Path(folder)
    _require_no_path(folder, load_drafter(folder).config.target.name)
    files: dict[str, bytes | Path] = {
        name: folder / name
        for name in (CONFIG_FILE, WEIGHTS_FILE, PROBE_FILE, PLOT_FILE)
        if (folder / name).is_file()
    }
    # Reads the JSON files too, so they are sound below.
    files[CARD_FILE] = card_text(folder, repo_id=repo_id, license=license).encode()
    for name in (PROVENANCE_FILE, EVALUATION_FILE, SPEED_FILE):
        if (folder / name).is_file():
            files[name] = _public_json(folder / name)
    return dict(sorted(files.items()))


def _require_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise MTPError(
            f"repo_id: got {repo_id!r}, expected such as owner/name ({error})"
        ) from None


def _require_no_path(folder: Path, name: str | None) -> None:
    if name is not None and public_text(name) != name:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: target.name: got {name!r}, a path on this "
            "machine; write the target's hub name there, or null"
        )


def _public_json(path: Path) -> bytes:
    content = public_value(json.loads(path.read_bytes()))
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
