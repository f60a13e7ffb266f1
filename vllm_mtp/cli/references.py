# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp references``."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.errors import CheckpointError
from vllm_mtp.flags import flag
from vllm_mtp.references import reference_folders

_TAKEN = "<- taken when no model is named"


@dataclass(frozen=True)
class Reference:
    """A drafter that ships with the package.

    Attributes:
        name: The last part of its folder.
        target: The target's name.
        num_speculative_tokens: Most tokens to draft per step.
        folder: Absolute.
        default: Whether its target gets it when the user names no drafter.
    """

    name: str
    target: str
    num_speculative_tokens: int
    folder: str
    default: bool


@dataclass
class References:
    """List the drafters that ship with this package, best first, a line for each: name,
    target, most tokens per draft, folder. Give the folder to vLLM as `model`; without
    `model`, a target gets its first one here."""

    json: bool = flag("print a JSON list, for programs", False)

    def run(self) -> int:
        found = shipped()
        print(_as_json(found) if self.json else _as_text(found))
        return 0


def shipped() -> list[Reference]:
    """All of them, best first.

    Raises:
        CheckpointError: A folder's config cannot be read.
    """
    folders = [folder.resolve() for folder in reference_folders()]
    configs = [_read(folder) for folder in folders]
    return [
        Reference(
            name=folder.name,
            target=config.target.name or config.target.model_type,
            num_speculative_tokens=config.num_speculative_tokens,
            folder=str(folder),
            default=not any(_same_target(config, other) for other in configs[:index]),
        )
        for index, (folder, config) in enumerate(zip(folders, configs, strict=True))
    ]


def _same_target(one: DrafterConfig, other: DrafterConfig) -> bool:
    """As `serving.resolve` compares them."""
    return (
        not one.target.differences(other.target)
        and one.target.weights_fingerprint == other.target.weights_fingerprint
    )


def _read(folder: Path) -> DrafterConfig:
    # Not with `read_config`, whose module imports torch: seconds for a line of text.
    path = folder / "config.json"
    try:
        return DrafterConfig.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); install vllm-mtp again"
        ) from None


def _as_json(references: Sequence[Reference]) -> str:
    return json.dumps([asdict(item) for item in references], indent=2)


def _as_text(references: Sequence[Reference]) -> str:
    rows = [
        (item.name, item.target, f"k={item.num_speculative_tokens}", item.folder)
        for item in references
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        + (f"  {_TAKEN}" if item.default else "")
        for row, item in zip(rows, references, strict=True)
    ]
    return "\n".join(line.rstrip() for line in lines)
