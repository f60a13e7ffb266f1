# SPDX-License-Identifier: Apache-2.0
"""Run the matrix of tests/serving/lossless and write its table, docs/lossless.md.

    python -m tools.lossless                  the tiny float32 target, every row
    python -m tools.lossless --smollm2        SmolLM2-135M-Instruct and `shared`
    python -m tools.lossless --only "stop strings" ...

With several calls, each target keeps its last table. The exit code is 1 when anything
is not the target's.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from vllm_mtp.markdown import marked, table

if TYPE_CHECKING:
    from tests.serving.lossless.matrix import Result

ROOT = Path(__file__).parents[1]
PAGE, DATA = ROOT / "docs" / "lossless.md", ROOT / "docs" / "lossless.json"
FEW = " †"
"""Behind the drafts of a row that has hardly any."""
FEW_NOTE = (
    "† Fewer than 20 drafts: such a row shows that these requests are answered as the "
    "target alone answers them, and says little of drafting."
)
HEAD = (
    *("Row", "Answers", "Equal", "Float ties", "Different", "Drafts"),
    *("Tokens accepted", "Also seen"),
)


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smollm2", action="store_true", help="the real target")
    parser.add_argument("--only", nargs="*", help="these rows; the others stay")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines, problems = run(Path(folder), options.smollm2, options.only)
    print("\n".join(problems), file=sys.stderr)
    tables = json.loads(DATA.read_text("utf-8")) if DATA.exists() else {}
    name = "smollm2" if options.smollm2 else "tiny"
    tables[name] = merged(tables.get(name, []), lines) if options.only else lines
    DATA.write_text(json.dumps(tables, indent=1) + "\n", "utf-8")
    PAGE.write_text(renewed(PAGE.read_text("utf-8"), tables), "utf-8")
    return bool(problems)


def merged(before: list[list[str]], lines: list[list[str]]) -> list[list[str]]:
    """The lines before, with those of the same name renewed and new ones behind."""
    by_name = {line[0]: line for line in before}
    return list((by_name | {line[0]: line for line in lines}).values())


def run(
    folder: Path, smollm2: bool, only: list[str] | None
) -> tuple[list[list[str]], list[str]]:
    """The table's lines, and everything that is not as it should be."""
    # Here, since vLLM reads its environment when it is imported.
    from tests.serving.engines import cannot_here
    from tests.serving.lossless.matrix import Runs
    from tests.serving.lossless.rows import ENGINES, ROWS
    from tests.serving.lossless.subjects import smollm2_subject, tiny_chain_subject

    subject = smollm2_subject() if smollm2 else tiny_chain_subject(folder)
    lines, problems = [], []
    wanted = [r for r in ROWS if not only or r.name in only]
    reasons = {
        r.name: subject.without.get(r.engine) or cannot_here(ENGINES[r.engine].settings)
        for r in wanted
    }
    rows = [row for row in wanted if not reasons[row.name]]
    for result in Runs(rows).compared(subject, rows):
        lines.append(line_of(result))
        print(*lines[-1], sep=" | ", flush=True)
        problems += [f"{result.row.name}: {text}" for text in result.problems]
    for name, reason in reasons.items():
        if reason:
            lines.append([name, *["-"] * (len(HEAD) - 2), f"not run: {reason}"])
    return lines, problems


def line_of(result: "Result") -> list[str]:
    """One row of the table."""
    facts = result.drafted.facts
    seen = [f"{getattr(facts, name)} {name}" for name in result.row.shows]
    return [
        result.row.name,
        str(len(result.comparisons)),
        *(str(result.num(verdict)) for verdict in ("equal", "tie", "different")),
        f"{facts.counts.drafts}{FEW if result.has_few_drafts else ''}",
        str(facts.counts.accepted_tokens),
        ", ".join(seen).replace("_", " "),
    ]


def renewed(page: str, tables: dict[str, list[list[str]]]) -> str:
    """The page with its tables made anew."""
    parts = [
        f"### {title}\n\n{table(HEAD, tables[name])}"
        for name, title in (
            ("tiny", "A tiny Llama in float32"),
            ("smollm2", "SmolLM2-135M-Instruct in float32, drafter `shared`"),
        )
        if name in tables
    ]
    if any(FEW in cell for lines in tables.values() for line in lines for cell in line):
        parts.append(fill(FEW_NOTE, 88))
    return marked(page, "lossless", "\n\n".join(parts))


if __name__ == "__main__":
    sys.exit(main())
