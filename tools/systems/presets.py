# SPDX-License-Identifier: Apache-2.0
"""The settings files of examples/systems, and what their first lines say."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "systems"
BASE = FOLDER / "base.yaml"
ARM = "arm-"
# "# Title (arXiv 2311.13581)", with a word before the number where it is not that alone
_FIRST_LINE = re.compile(
    r"# (?P<title>.+) \((?P<source>(?:[a-z]+ )*(?:arXiv (?P<arxiv>\d{4}\.\d{5})"
    r"|this package))\)"
)


@dataclass(frozen=True)
class Preset:
    """One settings file.

    Attributes:
        name: Of the file.
        title: Of the system.
        source: Where it comes from, in words.
        arxiv: The paper's number, if there is one.
    """

    name: str
    title: str
    source: str
    arxiv: str | None

    @property
    def file(self) -> Path:
        """The settings."""
        return FOLDER / f"{self.name}.yaml"

    @property
    def command_file(self) -> str:
        """The file as a command from the repository's root names it."""
        return str(self.file.relative_to(ROOT))

    @property
    def is_arm(self) -> bool:
        """Whether it is one side of a comparison, and no system of its own."""
        return self.name.startswith(ARM)

    @property
    def link(self) -> str:
        """The source as Markdown."""
        if self.arxiv is None:
            return self.source
        return f"[{self.source}](https://arxiv.org/abs/{self.arxiv})"

    def settings(self) -> dict[str, Any]:
        """What the file says."""
        return settings_of(self.file)


def settings_of(file: Path) -> dict[str, Any]:
    """A settings file's keys and values."""
    return yaml.safe_load(file.read_text("utf-8"))


@cache
def presets() -> dict[str, Preset]:
    """All of them by name, systems before arms.

    Raises:
        ValueError: A file's first line does not say what it is.
    """
    files = (file for file in FOLDER.glob("*.yaml") if file != BASE)
    found = sorted(map(_preset, files), key=lambda p: (p.is_arm, p.name))
    return {preset.name: preset for preset in found}


def _preset(file: Path) -> Preset:
    first = file.read_text("utf-8").partition("\n")[0]
    match = _FIRST_LINE.fullmatch(first)
    if match is None:
        raise ValueError(
            f"{file}: first line {first!r}; expected '# TITLE (arXiv NUMBER)' or "
            "'# TITLE (this package)'"
        )
    return Preset(file.stem, match["title"], match["source"], match["arxiv"])


def preset_of(run: str) -> Preset | None:
    """Whose run a folder of this name is: the longest name that it begins with."""
    names = (n for n in presets() if run == n or run.startswith(f"{n}-"))
    name = max(names, key=len, default=None)
    return presets()[name] if name else None
