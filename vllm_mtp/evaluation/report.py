# SPDX-License-Identifier: Apache-2.0
"""An offline evaluation as a table, as JSON and as a plot."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from vllm_mtp.errors import MTPError
from vllm_mtp.evaluation.offline import CategoryResult, OfflineResult
from vllm_mtp.files import report_folder
from vllm_mtp.markdown import aligned, plain, table
from vllm_mtp.metrics import AcceptanceCounts, mean_length

JSON_FILE = "evaluation.json"
TABLE_FILE = "evaluation.md"
PLOT_FILE = "acceptance.png"

# More lines than colours that can be told apart say nothing.
_MOST_LINES = 9
_NOTE = (
    "Position i: part of the drafts whose first i tokens were all accepted. AL k: "
    "acceptance length with k drafted tokens per step, bonus token included. TFL k: "
    "teacher-forced length, the same sum over a draft behind every token, which is no "
    "decoding."
)


def write_report(result: OfflineResult, folder: Path | str) -> list[Path]:
    """Write ``evaluation.json``, ``evaluation.md`` and ``acceptance.png``.

    Returns:
        The files; those of an earlier evaluation are replaced.

    Raises:
        MTPError: matplotlib is missing, or the folder cannot be written.
    """
    require_matplotlib()
    folder = Path(folder)
    files = [folder / name for name in (JSON_FILE, TABLE_FILE, PLOT_FILE)]
    with report_folder(folder):
        files[0].write_text(result.to_json(), "utf-8")
        files[1].write_text(markdown(result) + "\n", "utf-8")
        plot(result, files[2])
    return files


def require_matplotlib() -> None:
    """Raise unless a plot can be made.

    Raises:
        MTPError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MTPError(
            f"{PLOT_FILE} needs matplotlib, which is not installed: pip install "
            "'vllm-mtp[bench]', or leave out --out for the table alone"
        )


def markdown(result: OfflineResult) -> str:
    """Both measures as markdown tables, a row per category and one for all."""
    rows = [*result.by_category.items(), ("**all**", result.total)]
    return "\n\n".join(
        [
            f"### Simulated greedy decoding, {result.k} drafted tokens per step",
            _table(
                result.k, "AL", [(name, row, row.simulated_by_k) for name, row in rows]
            ),
            "### Teacher-forced: a draft behind every token",
            _table(
                result.k,
                "TFL",
                [(name, row, row.teacher_forced_by_k) for name, row in rows],
            ),
            _NOTE,
        ]
    )


def compare_served(
    offline: OfflineResult, served: Mapping[str, AcceptanceCounts]
) -> tuple[str, float]:
    """Simulated decoding beside what vLLM counted, and how far they are apart.

    Args:
        offline: Of the same rows.
        served: vLLM's counters by category.

    Returns:
        A markdown table, and the largest difference of any position over all rows, in
        points (hundredths).
    """
    total = sum(served.values(), AcceptanceCounts(0, 0, ()))
    pairs = [(n, r.simulated, served[n]) for n, r in offline.by_category.items()]
    pairs.append(("**all**", offline.total.simulated, total))
    positions_head = [f"position {i}" for i in range(1, offline.k + 1)]
    rows = []
    for name, ours, its in pairs:
        positions = zip(
            ours.acceptance_per_position, its.acceptance_per_position, strict=True
        )
        cells = [f"{a:.3f} / {b:.3f}" for a, b in positions]
        lengths = [f"{counts.acceptance_length:.3f}" for counts in (ours, its)]
        rows.append([plain(name), *cells, *lengths])
    both = zip(
        offline.total.simulated.acceptance_per_position,
        total.acceptance_per_position,
        strict=True,
    )
    apart = max(abs(a - b) for a, b in both)
    head = ["category", *positions_head, "AL", "AL in vLLM"]
    return table(head, rows), 100 * apart


def _table(
    k: int,
    length: str,
    rows: Sequence[tuple[str, CategoryResult, Sequence[AcceptanceCounts]]],
) -> str:
    numbers = range(1, k + 1)
    header = ["category", "sequences", "tokens", "drafts"]
    header += [f"position {i}" for i in numbers] + [f"{length} k={i}" for i in numbers]
    return aligned(header, [_cells(name, row, by_k) for name, row, by_k in rows])


def _cells(
    name: str, row: CategoryResult, by_k: Sequence[AcceptanceCounts]
) -> list[str]:
    whole = by_k[-1]
    return [
        plain(name),
        f"{row.sequences:,}",
        f"{row.tokens:,}",
        f"{whole.drafts:,}",
        *(f"{part:.3f}" for part in whole.acceptance_per_position),
        *(f"{mean_length(counts):.3f}" for counts in by_k),
    ]


def plot(result: OfflineResult, path: Path) -> None:
    """Draw the acceptance by position in simulated decoding, a line per category.

    Args:
        result: What to draw; of many categories, those with the most drafts.
        path: A PNG file.
    """
    # Not pyplot: it would choose a window system, and keep the figure for ever.
    from matplotlib.figure import Figure

    positions = range(1, result.k + 1)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, row in _largest(result):
        axes.plot(
            positions, row.simulated.acceptance_per_position, marker="o", label=name
        )
    everything = result.total.simulated.acceptance_per_position
    axes.plot(positions, everything, "k-o", linewidth=2.5, label=" all")
    axes.set(
        title=f"Simulated greedy decoding, k = {result.k}",
        xlabel="position",
        ylabel="drafts accepted up to this position",
        xticks=list(positions),
        ylim=(0, 1.02),
    )
    axes.grid(alpha=0.3)
    axes.legend(title=_legend_title(result))
    figure.savefig(path, dpi=150)


def _largest(result: OfflineResult) -> list[tuple[str, CategoryResult]]:
    by_drafts = sorted(
        result.by_category.items(), key=lambda item: -item[1].simulated.drafts
    )
    kept = {name for name, _ in by_drafts[:_MOST_LINES]}
    # matplotlib leaves names that begin with "_" out of the legend, and reads "$".
    return [
        (f" {name}".replace("$", r"\$"), row)
        for name, row in result.by_category.items()
        if name in kept
    ]


def _legend_title(result: OfflineResult) -> str | None:
    count = len(result.by_category)
    return f"{_MOST_LINES} largest of {count}" if count > _MOST_LINES else None
