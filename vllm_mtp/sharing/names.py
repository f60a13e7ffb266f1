# SPDX-License-Identifier: Apache-2.0
"""Names in place of paths: nobody's folders are shown with a drafter that is shared."""

import re
from typing import TypeVar

from pydantic import JsonValue

_T = TypeVar("_T", bound=JsonValue)

# ~, ~name, ., .. or a drive, up to the first separator.
_ROOT = r"(?:~[\w.-]*|\.{1,2}|[A-Za-z]:)?[\\/]"
_WHOLE = re.compile(rf"(?P<scheme>hf:)?(?:file:)?{_ROOT}")
# Not inside a name (org/name) and not the // of a URL, but of a file: URL.
_INSIDE = re.compile(
    rf"(?<![\w/\\.~-])(?!(?<=\w:)//)(?:file:/{{0,2}})?{_ROOT}[^\s\"',;()\[\]{{}}]+"
)
_CACHED = re.compile(
    r".*models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)"
    r"(?:[/\\]snapshots[/\\](?P<revision>[0-9a-f]+))?.*",
    re.DOTALL,
)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def public_text(text: str) -> str:
    """The text with every path on this machine cut down to its last part.

    A folder of the hub's cache becomes the repository's name. Relative paths that go
    downwards look like names (``org/name``) and stay.
    """
    if cached := _CACHED.fullmatch(text):
        return f"{cached['owner']}/{cached['name']}"
    if whole := _WHOLE.match(text):
        return (whole["scheme"] or "") + _last(text)
    return _INSIDE.sub(lambda match: _last(match[0]), text)


def public_value(value: _T) -> _T:
    """The same for every text inside a JSON value, keys included."""
    if isinstance(value, str):
        return public_text(value)  # type: ignore[return-value]
    if isinstance(value, list):
        return [public_value(item) for item in value]  # type: ignore[return-value]
    if isinstance(value, dict):
        return {  # type: ignore[return-value]
            public_text(key): public_value(item) for key, item in value.items()
        }
    return value


def cached_revision(path: str) -> str | None:
    """The commit of a folder of the hub's cache; None for any other folder."""
    cached = _CACHED.fullmatch(path)
    return cached["revision"] if cached else None


def is_repo_id(name: str) -> bool:
    """Whether a name can be a hub repository with its owner, ``org/name``."""
    return _REPO.fullmatch(name) is not None


def _last(path: str) -> str:
    return re.split(r"[\\/]+", path.rstrip("\\/"))[-1] or "."
