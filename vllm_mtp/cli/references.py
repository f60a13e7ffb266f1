# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp references``."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.errors import CheckpointError
from vllm_mtp.flags import flag
from vllm_mtp.installed import InstalledDrafter, installed_drafters

_TAKEN = "<- taken when no model is named"


@dataclass(frozen=True)
class Reference:
    """A drafter of an installed package.

    Attributes:
        name: As `InstalledDrafter` has it.
        target: The target's name.
        num_speculative_tokens: Most tokens to draft per step.
        distribution: The package that offers it.
        folder: Absolute; in a checkout, a link.
        default: Whether its target gets it when the user names no drafter.
    """

    name: str
    target: str
    num_speculative_tokens: int
    distribution: str
    folder: str
    default: bool


@dataclass(frozen=True)
class Broken:
    """One that an installed package offers, but that cannot be read.

    Attributes:
        name: As `InstalledDrafter` has it.
        distribution: The package that offers it.
        problem: What is wrong, in one line.
    """

    name: str
    distribution: str
    problem: str


@dataclass
class References:
    """List the drafters that installed packages offer, a line for each: name, target,
    most tokens per draft, package, folder. Give the folder to vLLM as `model`; without
    `model`, a target gets its first one here. Broken ones are named on stderr."""

    json: bool = flag("print a JSON list, for programs", False)

    def run(self) -> int:
        found, broken = _installed()
        print(_as_json(found) if self.json else _as_text(found))
        for one in broken:
            line = f"broken: {one.name} of {one.distribution}: {one.problem}"
            print(f"vllm-mtp references: {line}", file=sys.stderr)
        return 0


def shipped() -> list[Reference]:
    """Those that can be read, in the order in which a target is offered them."""
    return _installed()[0]


def _installed() -> tuple[list[Reference], list[Broken]]:
    found: list[Reference] = []
    broken: list[Broken] = []
    earlier: list[DrafterConfig] = []
    for drafter in installed_drafters():
        try:
            folder = drafter.folder()
            config = _read(folder, drafter)
        except (CheckpointError, OSError) as error:
            reason = " ".join(str(error).split())
            broken.append(Broken(drafter.name, drafter.distribution, reason))
            continue
        found.append(
            Reference(
                name=drafter.name,
                target=config.target.name or config.target.model_type,
                num_speculative_tokens=config.num_speculative_tokens,
                distribution=drafter.distribution,
                folder=str(folder),
                default=not any(_same_target(config, other) for other in earlier),
            )
        )
        earlier.append(config)
    return found, broken


def _same_target(one: DrafterConfig, other: DrafterConfig) -> bool:
    """As `serving.resolve` compares them."""
    return (
        not one.target.differences(other.target)
        and one.target.weights_fingerprint == other.target.weights_fingerprint
    )


def _read(folder: Path, drafter: InstalledDrafter) -> DrafterConfig:
    # Not with `read_config`, whose module imports torch: seconds for a line of text.
    path = folder / "config.json"
    try:
        return DrafterConfig.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); install {drafter.distribution} again"
        ) from None


def _as_json(references: Sequence[Reference]) -> str:
    return json.dumps([asdict(item) for item in references], indent=2)


def _as_text(references: Sequence[Reference]) -> str:
    if not references:
        return "no installed package offers a drafter (see docs/drafter-packages.md)"
    rows = [
        (
            item.name,
            item.target,
            f"k={item.num_speculative_tokens}",
            item.distribution,
            item.folder,
        )
        for item in references
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        + (f"  {_TAKEN}" if item.default else "")
        for row, item in zip(rows, references, strict=True)
    ]
    return "\n".join(line.rstrip() for line in lines)
