# SPDX-License-Identifier: Apache-2.0
"""From the runs' folders to what the page shows: docs/systems.json."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import product
from typing import Any

from tools.systems.reference import SETS
from tools.systems.runs import Run
from tools.systems.speed import predicted
from vllm_mtp.cli.main import _load
from vllm_mtp.data.store import read_split
from vllm_mtp.drafter.cost import draft_cost
from vllm_mtp.errors import MTPError
from vllm_mtp.evaluation.paired import paired_difference
from vllm_mtp.metrics import AcceptanceCounts
from vllm_mtp.sharing.provenance import data_record, read_provenance

STATE = "trainer_state.json"
_LENGTH = "eval_teacher_forced_length"
PAIRS = (
    ("arm-kv-hidden", "arm-kv"),
    ("arm-kv-hidden", "arm-hidden"),
    ("arm-kv-hidden", "arm-medusa"),
    ("arm-kv", "arm-hidden"),
    ("arm-kv", "arm-medusa"),
    ("arm-hidden", "arm-medusa"),
    ("arm-kv-hidden", "arm-chain"),
    ("arm-kv-hidden", "arm-bidirectional"),
)
"""Presets whose acceptance lengths are compared, run by run of the same label."""
TOGETHER = "together"
"""Label of the line that takes several runs of a pair as one."""
_Counts = list[AcceptanceCounts]


def gathered(runs: Sequence[Run], data: str) -> dict[str, Any]:
    """What is known of all runs, and of differences between arms.

    Args:
        runs: Trained ones.
        data: The folder that they were trained on.

    Raises:
        MTPError: A run was trained on other answers.
    """
    for run in runs:
        require_its_data(run, data)
    return {
        "runs": {run.name: _of_run(run, data) for run in runs},
        "differences": differences(runs),
    }


def _of_run(run: Run, data: str) -> dict[str, Any]:
    results = run.results()
    state = json.loads((run.folder / STATE).read_text("utf-8"))
    per_step = labels_per_step(str(run.preset.file), data)
    log = state["log_history"]
    trained = [line for line in log if "trained_parameters" in line]
    training = results.get("train", {})
    found = {
        "preset": run.preset.name,
        "label": run.label,
        "steps": state["global_step"],
        # What `train` of this package is told by hand stands in Trainer's own state.
        "overrides": training.get("overrides", {"max_steps": state["max_steps"]}),
        "minutes": minutes_of(run, training),
        "labels": round(state["global_step"] * per_step),
        "trained_parameters": trained[-1]["trained_parameters"] if trained else None,
        "draft_weights": draft_cost(run.config).relative_weights,
        "is_served": run.is_served,
        "predicted": predicted(results),
        "curve": curve_of(log, per_step),
        "cpus": results.get("cpus", {}),
    }
    offline = results.get("offline")
    # The rows are for differences, and far too many for a page.
    kept = {
        name: results[name] for name in ("served", "cost", "speed") if name in results
    }
    return found | kept | ({"offline": offline["sets"]} if offline else {})


def require_its_data(run: Run, data: str) -> None:
    """Labels are counted in these answers: refuse others.

    Raises:
        MTPError: The run was trained on others.
    """
    provenance = read_provenance(run.folder)
    known = provenance.data if provenance else None
    if known is not None and known.generation != data_record(data).generation:
        raise MTPError(
            f"{run.name}: was trained on {known.name}, got --data {data} with other "
            "answers; name that folder, and leave out runs of others by --only"
        )


def minutes_of(run: Run, training: Mapping[str, Any]) -> float | None:
    """CPU time of the training where `train` measured it, else what its clock said,
    which does not go on from run to run."""
    if seconds := training.get("cpu_seconds"):
        return seconds / 60
    provenance = read_provenance(run.folder)
    known = provenance.training if provenance else None
    if known is None or known.resumed_from_step:
        return None
    return known.wall_seconds / 60


def curve_of(
    log: Iterable[Mapping[str, Any]], labels_per_step: float
) -> list[tuple[int, float]]:
    """Labels seen and teacher-forced length of each evaluation while training.

    Args:
        log: ``log_history`` of Trainer's state.
        labels_per_step: As `labels_per_step` gives them.
    """
    found = {line["step"]: line[_LENGTH] for line in log if _LENGTH in line}
    return [
        (round(step * labels_per_step), length)
        for step, length in sorted(found.items())
    ]


@cache
def labels_per_step(file: str, data: str) -> float:
    """Tokens that the blocks of an average step are held against.

    Args:
        file: The settings.
        data: The folder of the target's answers.
    """
    args = _load("train", [file, "--target", "none", "--data", data])
    spans = read_split(data)["loss_spans"]
    k, blocks = args.num_speculative_tokens, args.anchors_per_text
    per_text = [
        labels_of_text(
            [min(end, args.max_text_tokens) - start for start, end in row], k, blocks
        )
        for row in spans
    ]
    texts = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return texts * sum(per_text) / len(per_text)


def labels_of_text(answers: Iterable[int], k: int, most_blocks: int) -> float:
    """Labels of one text in one step, on average over where its blocks stand.

    Args:
        answers: Tokens of each of its answers, as far as the text is read.
        k: Positions of a block.
        most_blocks: Of a text.
    """
    # Behind an answer's last token but one there is one label, behind the last none.
    anchors = [max(tokens - 1, 0) for tokens in answers]
    labels = sum(min(k, left) for n in anchors for left in range(1, n + 1))
    total = sum(anchors)
    return labels * min(total, most_blocks) / total if total else 0.0


def differences(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Every pair of `PAIRS` that has runs of the same label, on each set of prompts.

    Where a pair has several runs, another line takes them together: counts of a prompt
    are summed over them, so that prompts are drawn and runs are not.
    """
    by_name = {(run.preset.name, run.label): run for run in runs if run.preset.is_arm}
    found = []
    for prompts, (one, other) in product(SETS, PAIRS):
        sides: list[tuple[_Counts, _Counts]] = []
        for label in sorted({label for name, label in by_name if name == one}):
            both = [by_name.get((name, label)) for name in (one, other)]
            counts = [run.counts(prompts) if run else [] for run in both]
            if not all(counts):
                continue
            sides.append((counts[0], counts[1]))
            found.append(_compared(one, other, label, prompts, *sides[-1]))
        if len(sides) > 1:
            summed = [
                [sum(each[1:], each[0]) for each in zip(*some, strict=True)]
                for some in zip(*sides, strict=True)
            ]
            found.append(_compared(one, other, TOGETHER, prompts, *summed))
    return found


def _compared(
    one: str, other: str, label: str, prompts: str, *counts: _Counts
) -> dict[str, Any]:
    named = {"one": one, "other": other, "label": label, "set": prompts}
    return named | asdict(paired_difference(*counts))
