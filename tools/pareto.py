# SPDX-License-Identifier: Apache-2.0
"""Acceptance against the cost of a draft, for every drafter that was trained.

    python -m tools.pareto         # docs/pareto.png, from docs/ablation.json and the
                                   # shipped drafters

Both axes need no clock: acceptance is teacher-forced on held-out text, the cost is the
weights that a draft reads, in target steps. AL / (1 + cost) is then the speed-up of a
machine on which reading weights takes all the time.
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
from vllm_mtp.references import reference_folders
from vllm_mtp.sharing.folder import read_evaluation

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "ablation.json"
PLOT = ROOT / "docs" / "pareto.png"
_APART = 0.04


@dataclass(frozen=True)
class Candidate:
    """One trained drafter.

    Attributes:
        name: For the plot.
        cost: Of a draft, in target steps.
        length: Acceptance length, bonus token included.
        shipped: Whether it comes with the package (and had far more training).
    """

    name: str
    cost: float
    length: float
    shipped: bool

    @property
    def speed_up(self) -> float:
        """Where reading weights takes all the time, and verifying no more than that."""
        return self.length / (1 + self.cost)


def candidates() -> list[Candidate]:
    """The ablation's rows and the shipped drafters."""
    results = json.loads(RESULTS.read_text("utf-8"))
    rows = {key_of(row["set"]): row["name"] for q in questions() for row in q["rows"]}
    found = [
        Candidate(
            rows[key],
            result["draft_cost"],
            result["eval_acceptance_length"],
            shipped=False,
        )
        for key, result in results.items()
        if key in rows
    ]
    for folder in reference_folders():
        evaluation = read_evaluation(folder)
        assert evaluation is not None
        length = evaluation.total.teacher_forced.acceptance_length
        cost = draft_cost(read_config(folder)).relative_cost
        found.append(Candidate(folder.name, cost, length, shipped=True))
    return found


def frontier(found: list[Candidate]) -> list[Candidate]:
    """Those that no other beats in cost and length at once, cheapest first."""
    best: list[Candidate] = []
    for one in sorted(found, key=lambda c: (c.cost, -c.length)):
        if not best or one.length > best[-1].length:
            best.append(one)
    return best


def plot(found: list[Candidate], path: Path) -> None:
    """All candidates, the frontiers of both kinds, and where drafting pays off."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for shipped, color in ((False, "#4c72b0"), (True, "#c44e52")):
        some = [one for one in found if one.shipped == shipped]
        label = "shipped, fully trained" if shipped else "ablation, 120 steps"
        axes.scatter(
            [c.cost for c in some], [c.length for c in some], color=color, label=label
        )
        _name(axes, frontier(some), color)
    costs = [0.0, max(one.cost for one in found)]
    for gain in (1.0, 1.5):
        axes.plot(costs, [gain * (1 + c) for c in costs], "k--", linewidth=0.8)
        axes.annotate(f"{gain} x", (costs[1], gain * (1 + costs[1])), fontsize=8)
    axes.set_xlabel("cost of a draft, in target steps (weights read)")
    axes.set_ylabel("acceptance length, teacher-forced, held-out")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=110)


def _name(axes: Axes, best: list[Candidate], color: str) -> None:
    axes.plot([c.cost for c in best], [c.length for c in best], color=color)
    for one, following in zip(best, [*best[1:], None], strict=True):
        if following is not None and following.cost - one.cost < _APART:
            continue  # the names would cover each other
        axes.annotate(
            one.name,
            (one.cost, one.length),
            fontsize=8,
            xytext=(4, 4),
            textcoords="offset points",
        )


def main() -> int:
    """Write the plot, and print the candidates, best first."""
    found = candidates()
    plot(found, PLOT)
    for one in sorted(found, key=lambda c: -c.speed_up):
        mark = "shipped" if one.shipped else ""
        print(
            f"{one.speed_up:.2f}  AL {one.length:.2f}  cost {one.cost:.2f}  "
            f"{one.name}  {mark}"
        )
    print(f"written: {PLOT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
