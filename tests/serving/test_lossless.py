# SPDX-License-Identifier: Apache-2.0
"""The matrix on a tiny fp32 target: a drafter changes nothing that a user sees."""

from collections.abc import Callable
from pathlib import Path

import pytest
from vllm.exceptions import VLLMValidationError

from tests.serving.engines import ON_V2, cannot_here, engine
from tests.serving.lossless.matrix import Result, run_rows
from tests.serving.lossless.plays import Stage
from tests.serving.lossless.rows import ENGINES, ROWS, Row
from tests.serving.lossless.subjects import (
    MAX_MODEL_LEN,
    Subject,
    make_tiny_speaker,
    tiny_subject,
)

pytestmark = pytest.mark.engine

HERE = [row for row in ROWS if row.on_v2 or not ON_V2]


@pytest.fixture(scope="module")
def subject(
    tmp_path_factory: pytest.TempPathFactory, tiny_drafter: Callable[[str, str], Path]
) -> Subject:
    target = make_tiny_speaker(tmp_path_factory.mktemp("speaker"))
    return tiny_subject(target, tiny_drafter("llama", "shared-4"), on_v2=ON_V2)


class Results(dict[str, dict[str, Result]]):
    """By engine and row; an engine's rows are run when the first is asked for."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def __missing__(self, engine: str) -> dict[str, Result]:
        rows = [row for row in HERE if row.engine == engine]
        self[engine] = {r.row.name: r for r in run_rows(self._subject, rows)}
        return self[engine]


@pytest.fixture(scope="module")
def results(subject: Subject) -> Results:
    return Results(subject)


@pytest.mark.parametrize("row", HERE, ids=lambda row: row.name)
def test_nothing_changes(row: Row, results: Results) -> None:
    if reason := cannot_here(ENGINES[row.engine].settings):
        pytest.skip(reason)
    result = results[row.engine][row.name]
    assert result.problems == []
    print(f"{result.num('equal')} equal, {result.drafted.facts}")


REFUSED = {
    "min-p": {"min_p": 0.5, "temperature": 1.0},
    "logit bias": {"logit_bias": {3: 50.0}},
}


def test_what_vllm_refuses_with_any_speculation(subject: Subject) -> None:
    """docs/lossless.md names these; a release that takes them needs rows for them."""
    settings = {"max_model_len": MAX_MODEL_LEN} | subject.settings
    with engine(subject.target, subject.spec, **settings) as llm:
        stage = Stage(llm, subject)
        for sampling in REFUSED.values():
            with pytest.raises(VLLMValidationError, match="with speculative"):
                stage.ask([[1, 2, 3]], **sampling)
        with pytest.raises(ValueError, match="[Pp]ooling"):
            llm.encode([{"prompt_token_ids": [1, 2, 3]}], pooling_task="embed")
        assert stage.ask([[1, 2, 3]])  # and goes on
