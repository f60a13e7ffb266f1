# SPDX-License-Identifier: Apache-2.0
"""Write the table of patches in docs/patches.md from the ledger.

python tools/ledger_table.py            write it
python tools/ledger_table.py --check    only say whether it is up to date
"""

import argparse
import sys
from pathlib import Path

from vllm_mtp.serving.ledger import PATCHES, Patch

PAGE = Path(__file__).parents[1] / "docs" / "patches.md"
START, END = "<!-- generated: patches -->\n", "<!-- end: patches -->"
HEAD = ("Patch", "Symbol", "What", "Why", "Seen in vLLM", "Goes when")


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    text = PAGE.read_text("utf-8")
    wanted = with_table(text)
    if not check:
        PAGE.write_text(wanted, "utf-8")
    elif text != wanted:
        print(f"stale: {PAGE}; run python {__file__}", file=sys.stderr)
        return 1
    return 0


def with_table(text: str) -> str:
    """``text`` with the part between the markers replaced by the table."""
    before, found_start, rest = text.partition(START)
    _, found_end, after = rest.partition(END)
    if not (found_start and found_end):
        raise SystemExit(f"{PAGE}: no markers {START.strip()} and {END}")
    return f"{before}{START}\n{table()}\n\n{END}{after}"


def table() -> str:
    """One row per patch, in the ledger's order."""
    rows = [HEAD, ("---",) * len(HEAD), *map(_row, PATCHES)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(patch: Patch) -> tuple[str, ...]:
    symbol = f"`{patch.symbol}`"
    if patch.aliases:
        symbol += f", also as imported by {', '.join(f'`{a}`' for a in patch.aliases)}"
    name = f"{patch.name} (CPU only)" if patch.cpu_only else patch.name
    cells = (name, symbol, patch.what, patch.why, patch.seen, patch.remove_when)
    return tuple(cell.replace("|", "\\|") for cell in cells)


if __name__ == "__main__":
    sys.exit(main())
