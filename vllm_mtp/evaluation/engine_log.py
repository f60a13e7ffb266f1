# SPDX-License-Identifier: Apache-2.0
"""What engines print, kept from the screen and shown when something fails."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from vllm_mtp import interrupts
from vllm_mtp.errors import MTPError


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
        prints to the screen again behind the block. Ctrl-C is told of on the screen.
        """
        _flush()
        out, err = os.dup(1), os.dup(2)
        try:
            with interrupts.screen(err):
                os.dup2(self._file.fileno(), 1)
                os.dup2(self._file.fileno(), 2)
                yield
        finally:
            _flush()
            for fd, copy in ((1, out), (2, err)):
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
