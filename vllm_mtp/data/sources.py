# SPDX-License-Identifier: Apache-2.0
"""The names that ``--prompts`` takes beside those of files and data sets."""

import re
from pathlib import Path

from vllm_mtp.errors import DataError, in_one_line

SHAREGPT = "sharegpt"
LATER = "sharegpt:later"
TASKS = "sharegpt:tasks"
OF_SHAREGPT = (SHAREGPT, LATER, TASKS)
HF = "hf:"
SELF = "self:"
EXISTING = f"a JSONL file, {HF}NAME_OR_PATH, {', '.join(OF_SHAREGPT)}, {SELF}N"

MOST_WRITTEN = 10_000_000
_COUNT = re.compile(r"[1-9][0-9]{0,7}")


def is_self(prompts: str) -> bool:
    """Whether the target shall write the prompts itself."""
    return prompts.startswith(SELF)


def count_of_self(prompts: str) -> int:
    """How many prompts the target shall write: N of ``self:N``.

    Raises:
        DataError: N is no number, or not a sensible one.
    """
    text = prompts.removeprefix(SELF)
    if _COUNT.fullmatch(text) and int(text) <= MOST_WRITTEN:
        return int(text)
    raise DataError(
        f"--prompts {prompts}: expected {SELF}N with the number of prompts that the "
        f"target writes, 1 to {MOST_WRITTEN:,}, such as {SELF}2000"
    )


def require_source(prompts: str) -> None:
    """Refuse a name behind which there is nothing.

    Raises:
        DataError: Lists what there is.
    """
    if is_self(prompts):
        count_of_self(prompts)
    elif prompts not in OF_SHAREGPT and not prompts.startswith(HF):
        try:
            path = Path(prompts).expanduser()
            if path.exists() and not path.is_dir():  # a pipe is no regular file
                return
        except (OSError, RuntimeError) as error:  # no name of a file, nobody's home
            raise DataError(
                f"--prompts {prompts[:80]}: cannot be read ({in_one_line(error)})"
            ) from None
        raise DataError(
            f"--prompts {prompts}: no such file, and no source of this name; expected "
            f"one of {EXISTING}"
        )
