# SPDX-License-Identifier: Apache-2.0
"""Write the tables that pages make from the package's data.

The patches in docs/patches.md come from the ledger, the vLLM releases in docs/status.md
from `vllm_mtp.serving.versions`, the targets in docs/targets.md from
`vllm_mtp.families` and `tools.recipes`, the plans in docs/scale.md from `tools.scale`,
what docs/unverified.md says in numbers from docs/unverified.json.

python -m tools.tables            write them
python -m tools.tables --check    only say whether they are up to date
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.recipes import recipes_table
from tools.scale import scale_table
from tools.unverified import kept_results, merged_table, taken_table
from vllm_mtp.families import FAMILIES, Family, Served
from vllm_mtp.markdown import marked, plain, table
from vllm_mtp.serving.ledger import PATCHES, Patch
from vllm_mtp.serving.versions import TABLE, Release, Runner, Status

ROOT = Path(__file__).parents[1]
UNVERIFIED = ROOT / "docs" / "unverified.md"


@dataclass(frozen=True)
class Part:
    """A table of a page, between ``<!-- generated: NAME -->`` and its end."""

    name: str
    page: Path
    make: Callable[[], str]

    def renewed(self, text: str) -> str:
        """``text`` with the table made anew."""
        try:
            return marked(text, self.name, self.make())
        except ValueError as error:
            raise SystemExit(f"{self.page}: {error}") from None


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, stale = parser.parse_args().check, 0
    for part in PARTS:
        text = part.page.read_text("utf-8")
        wanted = part.renewed(text)
        if check and text != wanted:
            print(f"stale: {part.page}; run python {__file__}", file=sys.stderr)
            stale = 1
        elif not check:
            part.page.write_text(wanted, "utf-8")
    return stale


def patches() -> str:
    """One row per patch, in the ledger's order."""
    head = ("Patch", "Symbol", "What", "Why", "In vLLM", "Goes when")
    return table(head, map(_patch_row, PATCHES))


def _patch_row(patch: Patch) -> tuple[str, ...]:
    symbol = f"`{patch.symbol}`"
    if patch.aliases:
        symbol += f", also as imported by {', '.join(f'`{a}`' for a in patch.aliases)}"
    name = f"{patch.name} (CPU only)" if patch.cpu_only else patch.name
    texts = (name, symbol, patch.what, patch.why, patch.seen, patch.remove_when)
    return tuple(map(plain, texts))


def releases() -> str:
    """One row per release of vLLM, the newest first."""
    head = ("vLLM", "V1 runner", "V2 runner", "Tested with")
    return table(head, map(_release_row, reversed(TABLE)))


def _release_row(release: Release) -> tuple[str, ...]:
    files = release.files.value if release.is_tested else "-"
    claims = (_claim(release.v1), _claim(release.v2))
    return (release.version, *map(plain, claims), files)


def _claim(runner: Runner) -> str:
    if runner.status is Status.TESTED:
        return "works"
    return f"{runner.status.value}: {runner.reason}"


def families() -> str:
    """One row per family."""
    head = ("Family", "vLLM's classes", "V1", "V2", "Shared", "Own", "Train", "Notes")
    return table(head, map(_family_row, FAMILIES))


def _family_row(family: Family) -> tuple[str, ...]:
    classes = ", ".join(f"`{name}`" for name in family.architectures)
    yes = {True: "yes", False: "no"}
    if family.v1 is Served.NOT_RUN:
        yes[True] = "not tried"
    texts = (
        *(family.name, classes, family.v1.value, family.v2.value),
        *(yes[family.shared], family.own.value, yes[family.trains], family.note),
    )
    return tuple(map(plain, texts))


PARTS = (
    Part("families", ROOT / "docs" / "targets.md", families),
    Part("recipes", ROOT / "docs" / "targets.md", recipes_table),
    Part("patches", ROOT / "docs" / "patches.md", patches),
    Part("releases", ROOT / "docs" / "status.md", releases),
    Part("scale", ROOT / "docs" / "scale.md", scale_table),
    Part("unverified", UNVERIFIED, lambda: taken_table(kept_results())),
    Part("merged", UNVERIFIED, lambda: merged_table(kept_results())),
)


if __name__ == "__main__":
    sys.exit(main())
