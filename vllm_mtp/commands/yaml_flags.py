# SPDX-License-Identifier: Apache-2.0
"""A YAML file of a command's settings, as flags."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from vllm_mtp.errors import MTPError


def flags_of_yaml(path: Path, known: Collection[str]) -> list[str]:
    """Turn ``key: value`` lines into flags.

    Flags that the user gives behind them win, since argparse keeps the last.

    Args:
        path: A YAML file holding one mapping of names to values or lists.
        known: Names of the command's settings.

    Raises:
        MTPError: No such file, not YAML, not a mapping, or an unknown key.
    """
    settings = _read(path)
    if unknown := sorted(set(settings) - set(known)):
        raise MTPError(
            f"{path}: unknown key {unknown[0]!r}; `vllm-mtp train --help` lists the "
            f"settings{_nearest(unknown[0], known)}"
        )
    flags: list[str] = []
    for name, value in settings.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *map(str, values)] if values else []
    return flags


def _read(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise MTPError(f"{path}: no such file; expected a YAML file of settings")
    try:
        settings = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MTPError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(settings, dict):
        raise MTPError(f"{path}: expected `key: value` lines, got {type(settings)}")
    return settings


def _nearest(name: str, known: Collection[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(str(name), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
