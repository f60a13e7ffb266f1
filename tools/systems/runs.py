# SPDX-License-Identifier: Apache-2.0
"""The runs of a folder, and what was measured of each."""

import json
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from tools.systems.presets import Preset, preset_of
from vllm_mtp.bench.cpu import this_cpu
from vllm_mtp.drafter.checkpoint import CONFIG_FILE, read_config
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.errors import MTPError
from vllm_mtp.files import write_whole
from vllm_mtp.metrics import AcceptanceCounts

_T = TypeVar("_T", bound="Trained")


@dataclass(frozen=True)
class Trained:
    """The folder of one training, and beside it what was measured of its drafter.

    Attributes:
        folder: The drafter's.
    """

    folder: Path

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.name

    @property
    def is_trained(self) -> bool:
        """Whether the drafter is there."""
        return (self.folder / CONFIG_FILE).is_file()

    @cached_property
    def config(self) -> DrafterConfig:
        """The drafter's."""
        return read_config(self.folder)

    @property
    def is_served(self) -> bool:
        """Whether vLLM can run it."""
        return not self.config.unserved

    @property
    def _results(self) -> Path:
        return self.folder.parent / f"{self.name}.json"

    def results(self) -> dict[str, Any]:
        """What was measured, by the command that did it."""
        if not self._results.is_file():
            return {}
        return json.loads(self._results.read_text("utf-8"))

    def keep(self, part: str, found: Any) -> None:
        """Write down what one command has measured, and on which CPU."""
        known = self.results()
        cpus = known.get("cpus", {}) | {part: str(this_cpu())}
        text = json.dumps(known | {part: found, "cpus": cpus}, indent=1)
        write_whole(self._results, text + "\n")

    def counts(self, prompts: str) -> list[AcceptanceCounts]:
        """Of each prompt of a set, with all tokens drafted, by simulated decoding."""
        offline = self.results().get("offline", {"rows": []})
        k = self.config.num_speculative_tokens
        return [
            AcceptanceCounts(drafts, drafts * k, (accepted,))
            for name, accepted, drafts in offline["rows"]
            if name == prompts
        ]


@dataclass(frozen=True)
class Run(Trained):
    """One training of a preset.

    Attributes:
        preset: Its settings.
    """

    preset: Preset

    @property
    def label(self) -> str:
        """What tells it from other runs of its preset; empty for the only one."""
        return self.name.removeprefix(self.preset.name).removeprefix("-")


def trained_runs(folder: Path, only: Sequence[str]) -> list[Run]:
    """The finished runs of a folder, systems before arms.

    Args:
        folder: Where they are.
        only: Names of runs or of presets; empty for all.

    Raises:
        MTPError: There is none.
    """
    runs = []
    for config in sorted(folder.glob(f"*/{CONFIG_FILE}")):
        preset = preset_of(config.parent.name)
        if preset is None:
            continue
        run = Run(config.parent, preset)
        if not only or {run.name, preset.name} & set(only):
            runs.append(run)
    if not runs:
        raise MTPError(
            f"--out {folder}: no trained run{' of these' if only else ''}; "
            "`python -m tools.systems train` makes them"
        )
    return sorted(runs, key=lambda run: (run.preset.is_arm, run.name))


def of_each(runs: Iterable[_T], measure: Callable[[_T], None]) -> None:
    """Measure every run, also behind one that fails: a night is long.

    Raises:
        MTPError: Names those that failed; what each said stands above.
    """
    failed: dict[str, None] = {}  # in their order, each once
    for run in runs:
        try:
            measure(run)
        except Exception:  # of vLLM, torch, the drafter
            traceback.print_exc()
            failed[run.name] = None
    require_none([*failed], "measured")


def require_none(failed: Sequence[str], done: str) -> None:
    """Say in the end which of many failed.

    Args:
        failed: Their names.
        done: What they were to be.

    Raises:
        MTPError: There are some.
    """
    if failed:
        raise MTPError(
            f"not {done}: {', '.join(failed)}; what each said stands above, and the "
            "same command goes on with them"
        )
