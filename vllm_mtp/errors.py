# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can reach. Each message names the key or file, what was
got, what was expected and what to do."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class MTPError(ValueError):
    """Base of every error that this package raises on purpose."""


class LayerSpecError(MTPError):
    """The text that lists a drafter's layers could not be read."""


class CheckpointError(MTPError):
    """A drafter folder is broken, incomplete or not in our format."""


class TargetMismatchError(MTPError):
    """A drafter was made for another target than the one at hand."""


class UnsupportedTargetError(MTPError):
    """The target cannot be read by our drafters (MLA, mamba-only, ...)."""


class DrafterNotFoundError(MTPError):
    """No drafter was given and none was found for the target."""


class MethodConfigError(MTPError):
    """The user's ``speculative_config`` for our method is wrong."""


class UnsupportedVLLMError(MTPError):
    """The vLLM that is installed is too old, or known not to run the method."""


class DataError(MTPError):
    """Prompts cannot be read, or a folder of answers is not what was asked for."""


class OutputError(MTPError):
    """A file cannot be written: no room, no permission, or no such place."""


def in_one_line(error: Exception, most: int | None = None) -> str:
    """The kind of an error of a library, and what it says, whose lines are many at
    times.

    Args:
        error: The error.
        most: Characters of what it says that are told; None for all.
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"


def refusal_of(error: "ValidationError", prefix: str = "") -> str:
    """The first thing that pydantic found, in one line.

    Args:
        error: What pydantic raised.
        prefix: Of the keys, such as ``--``.
    """
    item = error.errors()[0]
    said = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return prefix + said  # a rule of ours, which names its key
    for word in ("greater", "less"):
        said = said.replace(f"Input should be {word}", f"expected a number {word}")
    said = said.replace("Input should be", "expected")
    where = prefix + ".".join(map(str, item["loc"]))
    return f"{where}: got {item['input']!r}, {said}"
