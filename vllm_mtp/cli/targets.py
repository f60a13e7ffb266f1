# SPDX-License-Identifier: Apache-2.0
"""The flag ``--target``: a folder, or a hub repository."""

from pathlib import Path

from vllm_mtp.errors import MTPError, in_one_line


def target_folder(target: str) -> Path:
    """A local folder, or a hub repository's local copy."""
    folder = Path(target).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                target, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]
            )
        )
    except Exception as error:  # the hub client raises many kinds
        raise MTPError(
            f"--target {target!r}: no such folder here, and it could not be fetched "
            f"from the hub ({in_one_line(error)})"
        ) from None
