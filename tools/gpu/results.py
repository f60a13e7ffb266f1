# SPDX-License-Identifier: Apache-2.0
"""The run's results: a file of JSON lines, and the tables made from it.

Every row is on the disk when `append` returns, so a killed run loses nothing. The
first row holds the facts (device, command, versions); a row with ``status`` says how a
piece ended, the others are what it found.
"""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_mtp.markdown import plain, table

Row = dict[str, Any]
ROWS, TABLES = "results.jsonl", "results.md"


def append(folder: Path, row: Row) -> None:
    """Add a row behind those that other processes have written."""
    with (folder / ROWS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> list[Row]:
    """All rows; one that a kill has cut off is left out."""
    rows = []
    for line in (folder / ROWS).read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def spread_of(values: Sequence[float]) -> Row:
    """Median, and the tenth and ninetieth of a hundred."""
    ordered = sorted(values)
    tenth = (len(ordered) - 1) / 10
    return {
        "median": round(statistics.median(ordered), 3),
        "p10": round(ordered[round(tenth)], 3),
        "p90": round(ordered[round(9 * tenth)], 3),
        "count": len(ordered),
    }


def write_tables(folder: Path) -> str:
    """Make the tables from the rows; returns them."""
    rows = with_break_even(read(folder))
    facts = [f"- {key}: {value}" for key, value in rows[0].get("facts", {}).items()]
    lines = ["# GPU run", "", *facts]
    statuses = [row for row in rows if "status" in row]
    lines += ["", _table(statuses, drop=())]
    for piece in [row["piece"] for row in statuses]:
        found = [r for r in rows if r.get("piece") == piece and "status" not in r]
        if found:
            lines += ["", f"## {piece}", "", _table(found, drop=("piece",))]
    text = "\n".join(lines) + "\n"
    (folder / TABLES).write_text(text, "utf-8")
    return text


def with_break_even(rows: list[Row]) -> list[Row]:
    """Divide each step by the target's own, where both were measured: the acceptance
    length from which on drafting makes decoding faster."""
    own = {
        (row["batch"], row["context"]): row["step_ms"]["median"]
        for row in rows
        if row.get("side") == "none" and "step_ms" in row
    }
    out = []
    for row in rows:
        alone = own.get((row.get("batch"), row.get("context")))
        if "step_ms" in row and alone:
            row = row | {"break_even": round(row["step_ms"]["median"] / alone, 3)}
        out.append(row)
    return out


def _table(rows: Sequence[Row], drop: Sequence[str]) -> str:
    keys = [k for k in dict.fromkeys(k for row in rows for k in row) if k not in drop]
    return table(keys, ([_shown(row.get(key)) for key in keys] for row in rows))


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']} ({value['p10']} to {value['p90']})"
    return "" if value is None else plain(str(value))
