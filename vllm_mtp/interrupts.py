# SPDX-License-Identifier: Apache-2.0
"""What Ctrl-C does to a command that runs as a process of its own.

Python would raise ``KeyboardInterrupt`` wherever the main thread is. Inside another
package that ends as any exception or none, and often with a stack trace. So nothing is
raised there:

- As a rule the process ends at once. Files are written so that a kill harms none.
- Inside `deferred` the interrupt waits until the block asks with `stop_if_asked`, or
  ends. A second one ends the process at once.
- Inside `raising` it is Python's: for code of our own that has something to undo.

Where nobody has called `take_over`, as in a notebook or a test, Ctrl-C is Python's, and
nothing here does anything.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from enum import Enum, auto
from typing import NoReturn

from vllm_mtp import processes

EXIT_CODE = 130
UNWIND_SECONDS = 5.0
"""How long a command may take to end by itself once it was interrupted."""


class _Mode(Enum):
    END = auto()
    RAISE = auto()
    DEFER = auto()


class _State:
    """Of this process; there is one Ctrl-C."""

    name = ""
    advice = ""
    owner: int | None = None  # the process that took over; a fork is another
    mode = _Mode.END
    asked = False
    finished: int | None = None  # the exit code of the command that is done
    screen = 2  # the file descriptor to write to
    groups: set[int] = set()


def take_over(name: str) -> None:
    """Handle Ctrl-C from now on, until the process ends.

    Args:
        name: Of the command, for the last line that it prints.
    """
    _State.name = name
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # ignored, as by `nohup`, or somebody else's
    _State.owner = os.getpid()
    signal.signal(signal.SIGINT, _on_interrupt)
    # The first to be registered runs last. Behind it Python itself ends, and would let
    # an interrupt change the exit code.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def asked() -> bool:
    """Whether Ctrl-C was pressed."""
    return _State.asked


def advise(text: str) -> None:
    """What the user can do after an interrupt; ends the command's last line."""
    _State.advice = text


def last_line(name: str) -> str:
    """What an interrupted command says."""
    return f"vllm-mtp {name}: interrupted" + (_State.advice and f"; {_State.advice}")


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let an interrupt wait for `stop_if_asked`, or for the end of the block."""
    with _mode(_Mode.DEFER):
        yield
    if _State.mode is not _Mode.DEFER:
        stop_if_asked()


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` at once: for a block with something to undo."""
    with _mode(_Mode.RAISE):
        yield


@contextlib.contextmanager
def screen(descriptor: int) -> Iterator[None]:
    """Write to this file descriptor, while stderr is taken for something else."""
    before, _State.screen = _State.screen, descriptor
    try:
        yield
    finally:
        _State.screen = before


def stop_if_asked() -> None:
    """A safe point of a `deferred` block.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed since `take_over`.
    """
    if _State.asked:
        _limit_unwinding()
        raise KeyboardInterrupt


def stop() -> NoReturn:
    """As `stop_if_asked`, where Ctrl-C may have been pressed in another process.

    Raises:
        KeyboardInterrupt: Always.
    """
    _limit_unwinding()
    raise KeyboardInterrupt


@contextlib.contextmanager
def one_exception() -> Iterator[None]:
    """Let whatever comes out of an interrupted block be a ``KeyboardInterrupt``."""
    try:
        yield
    except BaseException:
        if _State.asked:
            raise KeyboardInterrupt from None
        raise


def end_too(group: int) -> None:
    """End this process group too, where the process ends without unwinding."""
    _State.groups.add(group)


def has_ended(group: int) -> None:
    """Forget a group of `end_too`."""
    _State.groups.discard(group)


def finish(code: int) -> int:
    """The command is done: from now on an interrupt changes its exit code no more.

    Returns:
        The exit code. After an interrupt this does not return: what Python and other
        packages do at the end of a process would print, or end in another code.
    """
    if _State.owner != os.getpid():
        return code
    if _State.asked:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if code:
            _leave(code)
    _State.finished = code
    return code


@contextlib.contextmanager
def _mode(mode: _Mode) -> Iterator[None]:
    before, _State.mode = _State.mode, mode
    try:
        yield
    finally:
        _State.mode = before


def _on_interrupt(*_: object) -> None:
    if os.getpid() != _State.owner:
        raise KeyboardInterrupt  # a fork, which did not take over
    if _State.finished is not None:
        _leave(_State.finished)
    if _State.asked or _State.mode is _Mode.END:
        _say(f"\n{last_line(_State.name)}\n")
        _leave(EXIT_CODE)
    _State.asked = True
    if _State.mode is _Mode.RAISE:
        stop_if_asked()
    _say("\ninterrupted: ends after the running step; at once if pressed again\n")


def _limit_unwinding() -> None:
    """End the process where unwinding hangs, or somebody swallows the exception."""
    # What is half undone may complain; the user has asked for the end.
    sys.unraisablehook = threading.excepthook = _nothing

    def too_long(*_: object) -> None:
        _say(f"{last_line(_State.name)}\n")
        _leave(EXIT_CODE)

    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, UNWIND_SECONDS)


def _nothing(_: object) -> None:
    pass


def _say(text: str) -> None:
    if not processes.is_first():
        return
    # Not `print`: the handler may have interrupted one.
    with contextlib.suppress(OSError):
        os.write(_State.screen, text.encode())


def _leave(code: int) -> NoReturn:
    """End the process, and what it started, now."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    for end in (_end_children, _end_groups):
        with contextlib.suppress(Exception):
            end()
    os._exit(code)


def _end_children() -> None:
    processes = sys.modules.get("multiprocessing")
    if processes is not None:
        for child in processes.active_children():
            child.kill()


def _end_groups() -> None:
    for group in _State.groups:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
