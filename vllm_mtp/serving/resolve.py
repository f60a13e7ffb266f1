# SPDX-License-Identifier: Apache-2.0
"""Find the drafter: the one that the user names, else one that fits the target."""

from pathlib import Path

from vllm_mtp.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_config
from vllm_mtp.errors import DrafterNotFoundError
from vllm_mtp.plugin import METHOD
from vllm_mtp.references import reference_folders
from vllm_mtp.target import TargetFacts, fingerprint_of_shapes, weights_fingerprint


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
    if (inside / CONFIG_FILE).is_file():
        return inside
    return _reference(target, facts, tried=[f"{inside}: no {CONFIG_FILE} there"])


def _named(model: str, revision: str | None) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise DrafterNotFoundError(
            f"speculative_config.model: {model!r} is a file; give the drafter's "
            f"folder, which holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    if model.startswith(("/", ".", "~")):
        raise DrafterNotFoundError(
            f"speculative_config.model: no such folder: {model!r}. Give the drafter's "
            f"folder, which holds {CONFIG_FILE} and {WEIGHTS_FILE}, or a hub id."
        )
    return _from_hub(model, revision)


def _from_hub(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Only our two files: nothing else of a repository is ever needed or run.
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=[CONFIG_FILE, WEIGHTS_FILE],
            )
        )
    except Exception as error:  # the hub client raises many kinds
        raise DrafterNotFoundError(
            f"speculative_config.model: {repo_id!r} is no folder here, and it could "
            f"not be fetched from the hub ({type(error).__name__}: {error}). Give an "
            "existing drafter folder or hub id."
        ) from None


def _reference(target: str, facts: TargetFacts, tried: list[str]) -> Path:
    fingerprint = _fingerprint(target)
    for folder in reference_folders():
        made_for = read_config(folder).target
        if differences := made_for.differences(facts):
            tried.append(f"{folder}: {differences[0]}")
        elif made_for.weights_fingerprint != fingerprint:
            tried.append(
                f"{folder}: the target's weights have other names or shapes "
                f"(fingerprint {fingerprint}, expected {made_for.weights_fingerprint})"
            )
        else:
            return folder
    raise DrafterNotFoundError(
        f"no drafter for target {target!r} was found. Tried:\n  "
        + "\n  ".join(tried)
        + "\nName one: {'method': '"
        + METHOD
        + "', 'model': FOLDER}; or make one:\n"
        f"  vllm-mtp init --target {target} --layers shared:all "
        f"--num-speculative-tokens 4 --out {Path(target) / METHOD}"
    )


def _fingerprint(target: str) -> str | None:
    """Fingerprint of a folder's or a hub repository's weights, if to be had."""
    if Path(target).is_dir():
        return weights_fingerprint(Path(target))
    from huggingface_hub import get_safetensors_metadata

    try:
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
