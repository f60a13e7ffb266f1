# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown, and pages that hold some."""

from collections.abc import Iterable, Sequence


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False
) -> str:
    """A table.

    Args:
        head: The columns' names.
        rows: Cells, Markdown themselves; see `plain` for any other text.
        numbers: Columns behind the first are shown to the right.
    """
    rule = ["---", *(["---:" if numbers else "---"] * (len(head) - 1))]
    return "\n".join(row(line) for line in (head, rule, *rows))


def row(cells: Sequence[str]) -> str:
    """One line of a table, for those that are printed while it grows."""
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


def aligned(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table to be read as text too: the first column to the left, numbers right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
        for line in lines
    ]
    return "\n".join(row(line) for line in [padded[0], rule, *padded[1:]])


def plain(text: str) -> str:
    """Text as a cell: on one line, and without the end of the cell in it."""
    return " ".join(text.split()).replace("|", "\\|")


def marked(page: str, name: str, made: str) -> str:
    """A page with one part made anew, the text around it kept.

    Args:
        page: Its text. The part stands between ``<!-- generated: NAME -->`` and
            ``<!-- end: NAME -->``.
        name: Of the part.
        made: What is to stand there.

    Raises:
        ValueError: The page has no such part.
    """
    start, end = f"<!-- generated: {name} -->\n", f"<!-- end: {name} -->"
    before, found_start, rest = page.partition(start)
    _, found_end, after = rest.partition(end)
    if not (found_start and found_end):
        raise ValueError(f"no markers {start.strip()} and {end}")
    return f"{before}{start}\n{made}\n\n{end}{after}"
