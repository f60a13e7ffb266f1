# SPDX-License-Identifier: Apache-2.0
"""The matrix on a tiny fp32 target: with a drafter, nothing that a user sees changes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serving.lossless.matrix import Result, run_rows
from tests.serving.lossless.rows import ROWS, Row
from tests.serving.lossless.subjects import Subject, make_tiny_speaker, random_stream

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def subject(
    tmp_path_factory: pytest.TempPathFactory, tiny_drafter: Callable[[str, str], Path]
) -> Subject:
    target = make_tiny_speaker(tmp_path_factory.mktemp("speaker"))
    # The first place is always right, the later ones hardly ever.
    spec = {
        "method": "mtp_placeholder",
        "model": str(tiny_drafter("llama", "shared-4")),
    }
    return Subject("tiny", target, spec, random_stream)


class Results(dict[str, dict[str, Result]]):
    """By engine and row; an engine's rows are run when the first is asked for."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def __missing__(self, engine: str) -> dict[str, Result]:
        rows = [row for row in ROWS if row.engine == engine]
        self[engine] = {r.row.name: r for r in run_rows(self._subject, rows)}
        return self[engine]


@pytest.fixture(scope="module")
def results(subject: Subject) -> Results:
    return Results(subject)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_nothing_changes(row: Row, results: Results) -> None:
    result = results[row.engine][row.name]
    assert result.problems == []
    print(f"{result.num('equal')} equal, {result.drafted.facts}")
