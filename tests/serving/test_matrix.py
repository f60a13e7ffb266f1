# SPDX-License-Identifier: Apache-2.0
"""The matrix: a drafter changes nothing that a user sees, and one that is the target is
accepted. Some cases in every run, all of them with

    pytest -m engine tests/serving/test_matrix.py
"""

import shutil
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.serving.engines import ON_V2, cannot_here, engine
from tests.serving.lossless.cases import (
    DRAFTERS,
    EVERY_RUN,
    FAMILIES,
    WHOLE,
    Case,
    engine_of,
)
from tests.serving.lossless.matrix import Result, Runs
from tests.serving.lossless.plays import Stage
from tests.serving.lossless.rows import ENGINES, ROWS
from tests.serving.lossless.subjects import (
    MAX_MODEL_LEN,
    Subject,
    make_speaker,
    random_stream,
    shorter_for_v2,
    smollm2_subject,
)
from vllm_mtp.drafter.checkpoint import save_drafter
from vllm_mtp.evaluation.equality import BF16_TIE_MARGIN
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter

pytestmark = pytest.mark.engine

ROW = {row.name: row for row in ROWS}
HERE = [case for case in WHOLE if case.runner == ("V2" if ON_V2 else "V1")]
LEAST_OF_REFERENCE = 0.25
"""Of its first tokens, what must be accepted in every row."""

# vLLM puts a block that accepted drafts fill into the prefix cache a step later; of the
# others, hardly any accepts more than one.
SPARES = {"chain": ("same_hits",)}

MakeDrafter = Callable[[str, str], Path]
MakeSubject = Callable[[Case], Subject]


class Speakers(dict[str, Path]):
    """Tiny targets that have a tokenizer, each made when it is asked for."""

    def __init__(self, targets: dict[str, Path], root: Path) -> None:
        self._targets, self._root = targets, root

    def __missing__(self, name: str) -> Path:
        folder = shutil.copytree(self._targets[name], self._root / name)
        self[name] = make_speaker(folder)
        return self[name]


@pytest.fixture(scope="module")
def speakers(
    tiny_targets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Speakers:
    return Speakers(tiny_targets, tmp_path_factory.mktemp("speakers"))


# As `tests.serving.conftest.DRAFTERS`, for a target of 30 layers.
OF_SMOLLM2 = {
    "shared-1": ("shared:all", 1),
    "own-1": ("own:all", 1),
    "own-some": ("own:0,7,14,22,29", 4),
    "mixed": ("shared:0-9,own:28,29", 4),
}


@pytest.fixture(scope="module")
def smollm2_drafter(
    smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("smollm2-drafters")

    def make(name: str) -> Path:
        if not (root / name).exists():
            layers, k = OF_SMOLLM2[name]
            boundary = "all" if name == "mixed" else "none"
            options = DrafterOptions(boundary_hidden=boundary)
            save_drafter(new_drafter(smollm2, layers, k, options), root / name)
        return root / name

    return make


@pytest.fixture(scope="module")
def make_subject(
    request: pytest.FixtureRequest, speakers: Speakers, tiny_drafter: MakeDrafter
) -> MakeSubject:
    def make(case: Case) -> Subject:
        family = FAMILIES[case.family]
        if family.target == "smollm2":
            return _smollm2(case, request.getfixturevalue("smollm2_drafter"))
        drafter = tiny_drafter(family.target, case.drafter)
        num_draft_tokens, exact = DRAFTERS[case.drafter]
        subject = Subject(
            str(case),
            speakers[family.target],
            {"method": "mtp_placeholder", "model": str(drafter)},
            random_stream,
            exact=exact,
            num_draft_tokens=num_draft_tokens,
            num_prompts=12,
            max_tokens=16,
            few_blocks=family.few_blocks,
            spares=(*family.spares, *SPARES.get(case.drafter, ())),
            settings=family.settings,
            block_sizes=family.block_sizes,
        )
        return shorter_for_v2(subject) if ON_V2 else subject

    return make


def _smollm2(case: Case, make_drafter: Callable[[str], Path]) -> Subject:
    """Real prompts; the drafter `reference` is what the method finds on its own."""
    settings, (num_draft_tokens, exact) = (
        FAMILIES[case.family].settings,
        DRAFTERS[case.drafter],
    )
    spec = {"method": "mtp_placeholder"}
    if case.drafter != "reference":
        spec["model"] = str(make_drafter(case.drafter))
    return replace(
        smollm2_subject(),
        spec=spec,
        exact=exact,
        num_draft_tokens=num_draft_tokens,
        num_prompts=6,
        max_tokens=12,
        crowd_tokens=24,
        tie_margin=BF16_TIE_MARGIN if "dtype" in settings else 0.0,
        least_accepted=LEAST_OF_REFERENCE if case.drafter == "reference" else 0.0,
        settings=settings,
    )


class Results:
    """By case; all of an engine's are run when the first is asked for."""

    def __init__(self, cases: Iterable[Case], make_subject: MakeSubject) -> None:
        self._cases = list(cases)
        self._make_subject = make_subject
        self._runs: dict[str, Runs] = {}
        self._found: dict[Hashable, dict[str, Result]] = {}

    def __getitem__(self, case: Case) -> Result:
        key = engine_of(case)
        if key not in self._found:
            rows = [ROW[c.row] for c in self._cases if engine_of(c) == key]
            runs = self._runs_of(case.family).compared(self._make_subject(case), rows)
            self._found[key] = {result.row.name: result for result in runs}
        return self._found[key][case.row]

    def _runs_of(self, family: str) -> Runs:
        if family not in self._runs:
            names = dict.fromkeys(c.row for c in self._cases if c.family == family)
            self._runs[family] = Runs(ROW[name] for name in names)
        return self._runs[family]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, make_subject: MakeSubject) -> Results:
    chosen = [
        item.callspec.params["case"]
        for item in request.session.items
        if getattr(item, "originalname", "") == test_nothing_changes.__name__
        and isinstance(item, pytest.Function)
    ]
    return Results(chosen, make_subject)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=str(case),
            marks=() if case in EVERY_RUN else pytest.mark.matrix,
        )
        for case in HERE
    ],
)
def test_nothing_changes(case: Case, results: Results) -> None:
    settings = ENGINES[ROW[case.row].engine].settings | FAMILIES[case.family].settings
    if reason := cannot_here(settings, FAMILIES[case.family].target):
        pytest.skip(reason)
    result = results[case]
    assert not result.problems, "\n".join(result.problems)
    print(f"{result.num('equal')} equal, {result.drafted.facts}")


REFUSED: dict[str, dict[str, Any]] = {
    "min-p": {"min_p": 0.5, "temperature": 1.0},
    "logit bias": {"logit_bias": {3: 50.0}},
}


@pytest.mark.skipif(ON_V2, reason="vLLM refuses them for either runner")
def test_what_vllm_refuses_with_any_speculation(make_subject: MakeSubject) -> None:
    """docs/lossless.md names these; a release that takes them needs rows for them."""
    from vllm.exceptions import VLLMValidationError

    subject = make_subject(HERE[0])
    with engine(subject.target, subject.spec, max_model_len=MAX_MODEL_LEN) as llm:
        stage = Stage(llm, subject)
        for sampling in REFUSED.values():
            with pytest.raises(VLLMValidationError, match="with speculative"):
                stage.ask([[1, 2, 3]], **sampling)
        with pytest.raises(ValueError, match="[Pp]ooling"):
            llm.encode([{"prompt_token_ids": [1, 2, 3]}], pooling_task="embed")
        assert stage.ask([[1, 2, 3]])  # and goes on
