# SPDX-License-Identifier: Apache-2.0
"""Acceptance against the weights that a draft reads, for every drafter trained.

    python -m tools.pareto         # docs/pareto.png, from docs/ablation.json and the
                                   # shipped drafters

Both axes need no clock: acceptance is teacher-forced on held-out text, and weights are
counted, those of a target step being 1. Length / (1 + weights) is then the speed-up on
a machine where reading weights takes all the time: a bound, and no forecast. Measured,
a step with a draft takes longer than 1 + weights (docs/benchmark.md), and decoding has
fewer drafts accepted than known text.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.ablation import key_of, questions
from vllm_mtp.drafter.checkpoint import read_config
from vllm_mtp.drafter.cost import draft_cost
from vllm_mtp.installed import installed_folder
from vllm_mtp.sharing.folder import read_evaluation

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "ablation.json"
PLOT = ROOT / "docs" / "pareto.png"
_APART = 0.05


@dataclass(frozen=True)
class Candidate:
    """One trained drafter.

    Attributes:
        name: For the plot.
        weights: Read by a draft, over those that a target step reads.
        length: Teacher-forced, bonus token included.
        shipped: Whether it comes with the package (and had far more training).
    """

    name: str
    weights: float
    length: float
    shipped: bool

    @property
    def at_best(self) -> float:
        """The speed-up where reading weights takes all the time, and verifying five
        rows no more than decoding one."""
        return self.length / (1 + self.weights)


def candidates() -> list[Candidate]:
    """The ablation's rows and the shipped drafters."""
    results = json.loads(RESULTS.read_text("utf-8"))
    rows = {key_of(row["set"]): row["name"] for q in questions() for row in q["rows"]}
    found = [
        Candidate(
            rows[key],
            result["draft_weights"],
            result["eval_teacher_forced_length"],
            shipped=False,
        )
        for key, result in results.items()
        if key in rows
    ]
    for name in ("cheap", "shared"):
        folder = installed_folder(name)
        evaluation = read_evaluation(folder)
        assert evaluation is not None
        length = evaluation.total.teacher_forced_length
        weights = draft_cost(read_config(folder)).relative_weights
        found.append(Candidate(name, weights, length, shipped=True))
    return found


def frontier(found: list[Candidate]) -> list[Candidate]:
    """Those that no other beats in weights and length at once, the lightest first."""
    best: list[Candidate] = []
    for one in sorted(found, key=lambda c: (c.weights, -c.length)):
        if not best or one.length > best[-1].length:
            best.append(one)
    return best


def plot(found: list[Candidate], path: Path) -> None:
    """All candidates, the frontiers of both kinds, and bounds of the speed-up."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for shipped, color in ((False, "#4c72b0"), (True, "#c44e52")):
        some = [one for one in found if one.shipped == shipped]
        label = "shipped, fully trained" if shipped else "ablation, 120 steps"
        axes.scatter(
            [c.weights for c in some],
            [c.length for c in some],
            color=color,
            label=label,
        )
        _name(axes, frontier(some), color)
    ends = [0.0, max(one.weights for one in found)]
    for gain in (1.0, 1.5):
        axes.plot(ends, [gain * (1 + w) for w in ends], "k--", linewidth=0.8)
        where = (ends[1], gain * (1 + ends[1]))
        axes.annotate(f"{gain} x at best", where, fontsize=8, ha="right", va="bottom")
    axes.set_xlabel("weights that a draft reads, over those of a target step")
    axes.set_ylabel("teacher-forced length, held-out text")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=110)


def _name(axes: Axes, best: list[Candidate], color: str) -> None:
    axes.plot([c.weights for c in best], [c.length for c in best], color=color)
    for one, following in zip(best, [*best[1:], None], strict=True):
        if following is not None and following.weights - one.weights < _APART:
            continue  # the names would cover each other
        axes.annotate(
            one.name,
            (one.weights, one.length),
            fontsize=8,
            xytext=(4, 4),
            textcoords="offset points",
        )


def main() -> int:
    """Write the plot, and print the candidates, best first."""
    found = candidates()
    plot(found, PLOT)
    for one in sorted(found, key=lambda c: -c.at_best):
        mark = "shipped" if one.shipped else ""
        print(
            f"at best {one.at_best:.2f}  teacher-forced length {one.length:.2f}  "
            f"weights {one.weights:.2f}  "
            f"{one.name}  {mark}"
        )
    print(f"written: {PLOT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
