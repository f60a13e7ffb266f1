# SPDX-License-Identifier: Apache-2.0
"""Writing files: whole or not at all, and with an error that names the file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vllm_mtp.errors import MTPError, OutputError
from vllm_mtp.interrupts import deferred


@contextmanager
def writing(path: Path | str, *also: type[Exception]) -> Iterator[None]:
    """Name the file or folder when it cannot be written; Ctrl-C waits meanwhile.

    Args:
        path: The file or folder.
        also: Other errors by which a library says so.

    Raises:
        OutputError: The disk is full, the folder may not be written to, or the like.
    """
    failures: tuple[type[Exception], ...] = (OSError, SafetensorError, *also)
    try:
        with deferred():
            yield
    except failures as error:
        raise OutputError(
            f"{path}: cannot be written ({error}). Make room there, or name a folder "
            "that can be written to"
        ) from error


@contextmanager
def report_folder(folder: Path) -> Iterator[None]:
    """Make the folder of ``--out``, and name it when it cannot be written.

    Raises:
        MTPError: Says to name another folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with deferred():
            yield
    except OSError as error:
        raise MTPError(
            f"--out {folder}: cannot be written ({error}); name another folder"
        ) from None


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole whenever it is there, power cuts included.

    Raises:
        OutputError: It cannot be written; what was there before is still there.
    """
    temporary = unfinished(path)
    with writing(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def unfinished(path: Path) -> Path:
    """The name of a file until it is whole."""
    return path.with_name(f".{path.name}.tmp")
