# SPDX-License-Identifier: Apache-2.0
"""What the command lines of several tools have in common."""

import argparse
import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NoReturn

from vllm_mtp.errors import MTPError


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a flag: the usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        self.exit(2, f"{self.prog}: {message}\n")


def count(text: str) -> int:
    """A flag's whole number, 1 or more."""
    return int(_number(text, int, "a whole number, 1 or more"))


def count_or_none(text: str) -> int:
    """A flag's whole number; 0 for none."""
    return int(_number(text, int, "a whole number, 0 (none) or more", least=0))


def above_0(text: str) -> float:
    """A flag's number above 0."""
    return _number(text, float, "a number above 0")


def _number(
    text: str, kind: Callable[[str], float], expected: str, least: float = math.ulp(0.0)
) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, expected {expected}")
    return value


def require(options: argparse.Namespace, *names: str) -> None:
    """Refuse a command line that lacks some flags.

    Raises:
        MTPError: Names the first one.
    """
    for name in names:
        if getattr(options, name) is None:
            raise MTPError(f"--{name}: got nothing, which this command needs")


def finish(name: str, work: Callable[[], int], interrupted: str) -> int:
    """The exit code of a tool, whose errors are one line.

    Args:
        name: Before that line.
        work: Gives the code.
        interrupted: What Ctrl-C leaves.
    """
    try:
        return work()
    except MTPError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; {interrupted}", file=sys.stderr)
        return 130


def alone(work: Any, *arguments: Any) -> Any:
    """What a function gives in a process of its own: vLLM reads its settings when it is
    imported, and memory comes back for sure."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()
