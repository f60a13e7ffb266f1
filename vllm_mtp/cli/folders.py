# SPDX-License-Identifier: Apache-2.0
"""The flag ``--out`` of commands that write one thing and never over another."""

from pathlib import Path

from vllm_mtp.errors import MTPError


def new_folder(out: str, file: str) -> Path:
    """The folder to write, which need not be there.

    Args:
        out: The flag's value.
        file: What it would hold, were one written to it before.

    Raises:
        MTPError: It holds that file.
    """
    folder = Path(out)
    if (folder / file).exists():
        raise MTPError(
            f"--out {folder}: holds a {file} already; name another folder, or remove "
            "it first"
        )
    return folder
