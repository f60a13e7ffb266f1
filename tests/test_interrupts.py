# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, in processes of their own."""

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

# A command whose atexit handler complains, as those of other packages do.
COMMAND = """
import atexit, os, subprocess, sys, time
from contextlib import suppress
from vllm_mtp import interrupts
from vllm_mtp.cli import main as cli

def complain():
    raise RuntimeError("at exit")

def tell(text):
    print(text, flush=True)

class Command:
    def run(self):
        atexit.register(complain)
        interrupts.advise("try again")
{body}

cli._load = lambda *_: Command()
sys.argv = ["vllm-mtp", "doctor"]
sys.exit(cli.main())
"""
LAST_LINE = "vllm-mtp doctor: interrupted; try again"


@contextmanager
def running(body: str, *, ignored: bool = False) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, once it has printed a line."""
    code = COMMAND.format(body=textwrap.indent(textwrap.dedent(body), " " * 8))
    handler = signal.SIG_IGN if ignored else signal.SIG_DFL
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


def rest_of(process: subprocess.Popen[str]) -> str:
    """What it prints until it ends; `communicate` would miss what is read already."""
    assert process.stdout is not None
    text = process.stdout.read()
    process.wait()
    return text


# Python misses a signal that comes between its look for one and a call that sleeps.
SOON = 0.1


def interrupted(body: str, times: Sequence[float] = (SOON,)) -> tuple[int, str, float]:
    """Exit code, what was printed, and seconds from the first wait to the end."""
    with running(body) as process:
        start = time.monotonic()
        for seconds in times:
            time.sleep(seconds)
            process.send_signal(signal.SIGINT)
        text = rest_of(process)
        return process.returncode, text, time.monotonic() - start


SWALLOWED = """
    tell("ready")
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            raise RuntimeError("cannot schedule new futures") from None
"""


def test_another_packages_exception_is_not_the_end() -> None:
    code, text, _ = interrupted(SWALLOWED)
    assert code == 130
    assert text.strip() == LAST_LINE


@pytest.mark.parametrize("block", ["deferred", "raising"])
def test_an_exception_after_the_interrupt_is_the_interrupt(block: str) -> None:
    code, text, _ = interrupted(
        f"""
        with interrupts.{block}():
            tell("ready")
            try:
                time.sleep(2)
            finally:
                raise RuntimeError("another one")
        """
    )
    assert code == 130
    assert text.strip().splitlines()[-1] == LAST_LINE
    assert "another one" not in text


def test_a_deferred_interrupt_waits_for_a_safe_point() -> None:
    code, text, _ = interrupted(
        """
        with interrupts.deferred():
            for step in range(100):
                interrupts.stop_if_asked()
                if not step:
                    tell("ready")
                time.sleep(2)
                with interrupts.deferred():
                    time.sleep(0.1)
                tell(f"step {step}")
        """,
    )
    assert code == 130
    lines = text.strip().splitlines()
    assert lines[0].startswith("interrupted: ends after the running step")
    assert lines[1:] == ["step 0", LAST_LINE]


def test_a_deferred_interrupt_ends_the_block_at_last() -> None:
    body = """
        with interrupts.deferred():
            tell("ready")
            time.sleep(2)
            tell("done")
        tell("never")
    """
    code, text, _ = interrupted(body)
    assert code == 130
    assert text.strip().splitlines()[-2:] == ["done", LAST_LINE]


@pytest.mark.parametrize("block", ["deferred", "raising"])
def test_the_second_interrupt_ends_it_at_once(block: str) -> None:
    code, text, seconds = interrupted(
        f"""
        with interrupts.{block}():
            tell("ready")
            try:
                time.sleep(50)
            finally:
                time.sleep(50)
        """,
        [SOON, 0.3],
    )
    assert code == 130
    assert text.strip().splitlines()[-1] == LAST_LINE
    assert seconds < 20


def test_unwinding_that_hangs_is_ended() -> None:
    code, text, seconds = interrupted(
        """
        interrupts.UNWIND_SECONDS = 0.5
        with suppress(BaseException), interrupts.raising():
            tell("ready")
            time.sleep(50)
        time.sleep(50)
        """
    )
    assert code == 130
    assert text.strip().splitlines()[-1] == LAST_LINE
    assert seconds < 20


def test_a_block_with_something_to_undo_undoes_it() -> None:
    code, text, _ = interrupted(
        """
        with interrupts.raising():
            tell("ready")
            try:
                time.sleep(50)
            finally:
                tell("undone")
        """
    )
    assert (code, text.strip().splitlines()) == (130, ["undone", LAST_LINE])


def test_what_it_started_ends_with_it() -> None:
    _, text, _ = interrupted(
        """
        from multiprocessing import get_context
        child = get_context("fork").Process(target=time.sleep, args=(50,))
        child.start()
        server = subprocess.Popen(["sleep", "50"], start_new_session=True)
        interrupts.end_too(server.pid)
        tell(f"ready\\n{child.pid} {server.pid}")
        time.sleep(50)
        """,
    )
    pids = [int(pid) for pid in text.split()[:2]]
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_command_that_was_done_keeps_its_exit_code() -> None:
    """The interrupt comes while other packages clean up."""
    body = """
        atexit.register(time.sleep, 50)
        atexit.register(tell, "ready")
        return 3
    """
    code, text, seconds = interrupted(body)
    assert (code, text) == (3, "")
    assert seconds < 20


def test_the_last_step_may_be_the_commands_end() -> None:
    body = """
        with suppress(KeyboardInterrupt), interrupts.raising():
            tell("ready")
            time.sleep(50)
        atexit.unregister(complain)
        return 0
    """
    code, text, _ = interrupted(body)
    assert (code, text.strip()) == (0, "")


def test_the_last_line_goes_to_the_screen_while_stderr_is_a_log() -> None:
    code, text, _ = interrupted(
        """
        tell("ready")
        copy, log = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(log, 2)
        with interrupts.screen(copy):
            time.sleep(50)
        """
    )
    assert (code, text.strip()) == (130, LAST_LINE)


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As under `nohup`, or in a shell's background job."""
    body = """
        tell("ready")
        time.sleep(2)
        atexit.unregister(complain)
        return 0
    """
    with running(body, ignored=True) as process:
        time.sleep(SOON)
        process.send_signal(signal.SIGINT)
        text = rest_of(process)
        assert (process.returncode, text) == (0, "")


def test_a_fork_is_interrupted_as_python_is() -> None:
    """Such as a process that loads data for `train`."""
    code, text, _ = interrupted(
        """
        child = os.fork()
        if not child:
            try:
                os.kill(os.getpid(), 2)
                time.sleep(50)
            except KeyboardInterrupt:
                os._exit(7)
        _, status = os.waitpid(child, 0)
        tell(f"ready\\n{os.waitstatus_to_exitcode(status)}")
        time.sleep(50)
        """,
    )
    assert code == 130
    assert text.split()[0] == "7"


def test_in_another_process_ctrl_c_stays_pythons() -> None:
    """`main` with arguments is called by other code."""
    before = signal.getsignal(signal.SIGINT)
    from vllm_mtp.cli.main import main

    assert main(["inspect", "--drafter", "/nonexistent"]) == 1
    assert signal.getsignal(signal.SIGINT) is before
