# SPDX-License-Identifier: Apache-2.0
"""Reports of several machines side by side."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_mtp import markdown
from vllm_mtp.bench.plan import PLAIN
from vllm_mtp.bench.report import spread_text
from vllm_mtp.bench.summary import Spread
from vllm_mtp.errors import MTPError

_Row = tuple[str, str, str]  # stage, load, side


def side_by_side(files: Sequence[str]) -> str:
    """The ratios of several ``benchmark.json``, as a Markdown table.

    A column is named by its report's device and type, and where two would have one
    name, by the report's folder too. Reports of older versions have no verdicts.

    Raises:
        MTPError: A file is no such report.
    """
    columns = [_read(Path(file)) for file in files]
    names = Counter(name for name, _ in columns)
    head = [
        markdown.plain(
            name + f" ({Path(file).resolve().parent.name})" * (names[name] > 1)
        )
        for file, (name, _) in zip(files, columns, strict=True)
    ]
    # In the order of the first report; what only others have follows.
    keys = dict.fromkeys(key for _, ratios in columns for key in ratios)
    first = 0 if len({stage for stage, _, _ in keys}) > 1 else 1
    rows = [
        [*key[first:], *(ratios.get(key, "") for _, ratios in columns)] for key in keys
    ]
    head = [*("Stage", "Load", "Side")[first:], *map(markdown.plain, head)]
    return markdown.table(head, rows)


def _read(path: Path) -> tuple[str, dict[_Row, str]]:
    """A column's name, and its ratios."""
    try:
        report: dict[str, Any] = json.loads(path.read_text("utf-8"))
        device = report["machine"]["device"].removeprefix("CPU, ")
        dtype = report["stages"][0]["plan"]["dtype"]
        ratios = {
            (stage["title"], line["load"], line["side"]): _cell(line)
            for stage in report["stages"]
            for line in stage["lines"]
            if line["side"] != PLAIN  # it is held against itself
        }
    except OSError as error:
        raise MTPError(f"--show {path}: cannot be read ({error})") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise MTPError(
            f"--show {path}: no report of this command ({error!r}); expected a "
            "benchmark.json"
        ) from None
    return f"{device}, {dtype}", ratios


def _cell(line: dict[str, Any]) -> str:
    verdict = line.get("verdict")
    return spread_text(Spread(**line["ratio"])) + (f", {verdict}" if verdict else "")
