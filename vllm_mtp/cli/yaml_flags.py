# SPDX-License-Identifier: Apache-2.0
"""A YAML file of a command's settings, as flags."""

import json
from collections.abc import Collection
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

from vllm_mtp.errors import MTPError


def flags_of_yaml(path: Path, settings: Collection[Field[Any]]) -> list[str]:
    """Turn ``key: value`` lines into flags.

    Flags that the user gives behind them win, since argparse keeps the last.

    Args:
        path: A YAML file holding one mapping of names to values or lists.
        settings: The command's settings, fields of its dataclass.

    Raises:
        MTPError: No such file, not YAML, not a mapping, an unknown key, or nothing
            as the value of a setting that cannot be nothing.
    """
    given = _read(path)
    known = {field.name: field for field in settings if field.init}
    if unknown := sorted(set(given) - set(known), key=str):
        raise MTPError(
            f"{path}: unknown key {unknown[0]!r}; `vllm-mtp train --help` lists the "
            f"settings{_nearest(unknown[0], known)}"
        )
    flags: list[str] = []
    for name, value in given.items():
        if value is None or value == []:
            flags += _flags_of_nothing(path, known[name], value)
        else:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *(_text(name, v) for v in values)]
    return flags


def _flags_of_nothing(path: Path, setting: Field[Any], value: Any) -> list[str]:
    """argparse cannot say "nothing": leaving the flag out means the default."""
    if setting.name == "report_to":
        return ["--report_to", "none"]
    default = setting.default
    if setting.default_factory is not MISSING:
        default = setting.default_factory()
    if default is None or default == []:
        return []
    raise MTPError(
        f"{path}: {setting.name}: got {json.dumps(value)}, expected a value; leave the "
        f"key out for the default ({default!r}), or write the value that switches it "
        "off (0 for a rank, a weight or a rate; a large number for a limit such as "
        "save_total_limit)"
    )


def _text(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    if value is False and name.endswith("_strategy"):
        return "no"  # YAML 1.1 reads a bare `no` as false
    return str(value)


def _read(path: Path) -> dict[Any, Any]:
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


# Names of 0.1 that are others now; the nearest ones would mislead.
_RENAMED = {
    "place_decay": "position_decay",
    "own_start": "own_init",
    "boundary_start": "boundary_init",
}


def _nearest(name: Any, known: Collection[str]) -> str:
    from difflib import get_close_matches

    if (now := _RENAMED.get(name)) in known:
        return f"; it is called {now!r} now"
    near = get_close_matches(str(name), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
