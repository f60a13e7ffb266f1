# SPDX-License-Identifier: Apache-2.0
"""What engines print, kept from the screen and shown when something fails."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from vllm_mtp.errors import MTPError
from vllm_mtp.interrupts import raising


class EngineLog:
    """Of all engines that a command starts.

    Args:
        file: Where it is kept.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Take what this process and those that it starts print.

        A process that is started here prints into the log until it ends; this one
        prints to the screen again behind the block.
        """
        _flush()
        screen = [(fd, os.dup(fd)) for fd in (1, 2)]
        try:
            # Raising, so that an interrupt finds the screen again.
            with raising():
                for fd, _ in screen:
                    os.dup2(self._file.fileno(), fd)
                yield
        finally:
            _flush()
            for fd, copy in screen:
                os.dup2(copy, fd)
                os.close(copy)

    def text(self) -> str:
        """What was printed so far."""
        size = os.fstat(self._file.fileno()).st_size
        # Not by seeking: the processes that print share the position in the file.
        return os.pread(self._file.fileno(), size, 0).decode(errors="replace")


@contextmanager
def engine_log() -> Iterator[EngineLog]:
    """A log that is printed when the block fails, and is gone behind it.

    An `MTPError` says itself what is wrong, and needs no log.
    """
    with tempfile.TemporaryFile(buffering=0) as file:
        log = EngineLog(file)
        try:
            yield log
        except MTPError:
            raise
        except Exception:
            print(log.text(), file=sys.stderr)
            raise


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
