# SPDX-License-Identifier: Apache-2.0
"""Fields of a dataclass that are flags of a command, and keys of its YAML file."""

from dataclasses import MISSING, field
from typing import Any


def flag(help_text: str, default: Any = MISSING) -> Any:
    """A dataclass field that is a command's flag; required without a default."""
    metadata = {"help": help_text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)
