# SPDX-License-Identifier: Apache-2.0
"""Find the drafter: the one that the user names, else one that fits the target."""

import logging
import stat
from functools import cache, partial
from pathlib import Path

from vllm_mtp.drafter.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_config
from vllm_mtp.drafter.target_facts import (
    TargetFacts,
    fingerprint_of_shapes,
    weights_fingerprint,
)
from vllm_mtp.errors import DrafterNotFoundError
from vllm_mtp.installed import GROUP, InstalledDrafter, installed_drafters
from vllm_mtp.plugin import METHOD
from vllm_mtp.serving.settings import shown

logger = logging.getLogger("vllm.mtp_placeholder")

_PATH = 1000  # most characters of a path in a message
_HUB_SECONDS = 10.0


def resolve_drafter(
    model: str | None, target: str, facts: TargetFacts, *, revision: str | None = None
) -> Path:
    """The drafter's folder.

    Args:
        model: Folder or hub id that the user gave, or None.
        target: The target's folder or hub id.
        facts: The target's facts.
        revision: Branch, tag or commit of a hub id.

    Raises:
        DrafterNotFoundError: Lists what was tried.
    """
    if model is not None:
        return _named(model, revision)
    inside = Path(target) / METHOD
    if _is_there(inside / CONFIG_FILE):
        return inside
    return _installed(target, facts, tried=[f"{inside}: no {CONFIG_FILE} there"])


def _is_there(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # no permission, say: whoever reads it will tell
        return True


def _named(model: str, revision: str | None) -> Path:
    try:
        path = Path(model).expanduser()
        mode = path.stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        if missing and not _is_path(model):
            return _from_hub(model, revision)
        raise DrafterNotFoundError(
            f"speculative_config.model: no such folder: {shown(model, _PATH)} "
            f"({_reason(error)}). Give the drafter's folder, which holds {CONFIG_FILE} "
            f"and {WEIGHTS_FILE}, or a hub id."
        ) from None
    if stat.S_ISDIR(mode):
        return path
    raise DrafterNotFoundError(
        f"speculative_config.model: {shown(model, _PATH)} is a file; give the "
        f"drafter's folder, which holds {CONFIG_FILE} and {WEIGHTS_FILE}"
    )


def _is_path(model: str) -> bool:
    return str(model).startswith(("/", ".", "~"))


def _reason(error: Exception) -> str:
    """Without the path, which the message has already and which may be long."""
    return getattr(error, "strerror", None) or str(error)


def _from_hub(repo_id: str, revision: str | None) -> Path:
    try:
        return _snapshot(repo_id, revision)
    except Exception as error:  # the hub client raises many kinds
        raise DrafterNotFoundError(
            f"speculative_config.model: {shown(repo_id)} is no folder here, and it "
            f"could not be fetched from the hub ({type(error).__name__}: "
            f"{str(error)[:500]}). Give an existing drafter folder or hub id."
        ) from None


def _snapshot(repo_id: str, revision: str | None) -> Path:
    """From the hub, or from its cache where the hub does not answer."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Only our two files: nothing else of a repository is ever needed or run.
    fetch = partial(
        snapshot_download,
        repo_id,
        revision=revision,
        allow_patterns=[CONFIG_FILE, WEIGHTS_FILE],
    )
    try:
        _ask_hub(repo_id, revision)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception as silence:
        try:
            return Path(fetch(local_files_only=True))
        except Exception:
            raise silence from None  # which says more than an empty cache
    return Path(fetch())


def _ask_hub(repo_id: str, revision: str | None = None) -> None:
    """Raise unless the hub answers: its client would wait for ever for a silent one."""
    from huggingface_hub import HfApi

    HfApi().repo_info(repo_id, revision=revision, timeout=_HUB_SECONDS)


def _installed(target: str, facts: TargetFacts, tried: list[str]) -> Path:
    """The first drafter of an installed package that fits."""
    # Only for a target whose facts fit: the hub may have to be asked.
    fingerprint = cache(partial(_fingerprint, target))
    drafters = installed_drafters()
    for drafter in drafters:
        try:
            folder = drafter.folder()
            made_for = read_config(folder).target
        except Exception as error:  # somebody else's package; the others are good
            tried.append(_skipped(drafter, error))
            continue
        if differences := made_for.differences(facts):
            problem = differences[0]
        elif made_for.weights_fingerprint != fingerprint():
            problem = (
                "the target's weights have other names or shapes (fingerprint "
                f"{fingerprint()}, expected {made_for.weights_fingerprint})"
            )
        else:
            return folder
        tried.append(f"{_in_words(drafter)}: {problem}")
    if not drafters:
        tried.append(f"installed packages: none offers a drafter (group {GROUP})")
    raise DrafterNotFoundError(
        f"no drafter for target {target!r} was found. Tried:\n  "
        + "\n  ".join(tried)
        + "\nInstall a package that offers one, or name one: {'method': '"
        + METHOD
        + "', 'model': FOLDER}; or make one:\n"
        f"  vllm-mtp init --target {target} --layers shared:all "
        f"--num-speculative-tokens 4 --out {Path(target) / METHOD}"
    )


def _skipped(drafter: InstalledDrafter, error: Exception) -> str:
    """Log that a drafter is broken; returns why, in one line."""
    reason = " ".join(str(error).split())[:500] or type(error).__name__
    line = f"{_in_words(drafter)}: broken: {reason}"
    logger.warning("%s: skipped %s", METHOD, line)
    return line


def _in_words(drafter: InstalledDrafter) -> str:
    return f"drafter {drafter.name!r} of {drafter.distribution}"


def _fingerprint(target: str) -> str | None:
    """Fingerprint of a folder's or a hub repository's weights, if to be had."""
    if Path(target).is_dir():
        return weights_fingerprint(Path(target))
    from huggingface_hub import get_safetensors_metadata

    try:
        _ask_hub(target)
        metadata = get_safetensors_metadata(target).files_metadata
    except Exception:  # offline, private, no safetensors: then nothing matches
        return None
    return fingerprint_of_shapes(
        {
            name: info.shape
            for file in metadata.values()
            for name, info in file.tensors.items()
        }
    )
