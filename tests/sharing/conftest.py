# SPDX-License-Identifier: Apache-2.0
"""A small trained drafter's papers, made up."""

from datetime import datetime, timezone
from pathlib import Path

import pytest

from tests.drafter.test_checkpoint import make_drafter
from vllm_mtp.data.settings import (
    EngineSettings,
    PromptCounts,
    RunSettings,
    SamplingSettings,
    SourceSettings,
    SplitCounts,
)
from vllm_mtp.data.settings import Provenance as Generation
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.evaluation.offline import CategoryResult, OfflineResult
from vllm_mtp.metrics import AcceptanceCounts
from vllm_mtp.sharing.provenance import (
    DataRecord,
    DrafterProvenance,
    ParentRecord,
    TargetRecord,
    TrainingRecord,
)

HOME = "/home/jane"


def category(accepted: tuple[int, int]) -> CategoryResult:
    return CategoryResult(
        4,
        400,
        AcceptanceCounts(200, 400, (150, 50)),
        (AcceptanceCounts(80, 80, (60,)), AcceptanceCounts(100, 200, accepted)),
    )


@pytest.fixture
def evaluation() -> OfflineResult:
    by_category = {"chat": category((80, 40)), "code": category((50, 10))}
    settings = {"drafter": f"{HOME}/out", "device": "cpu", "split": "held_out"}
    return OfflineResult(2, by_category, settings)  # type: ignore[arg-type]


@pytest.fixture
def drafter() -> Drafter:
    return make_drafter(extra_rows=0)  # as vLLM serves them


@pytest.fixture
def provenance(drafter: Drafter) -> DrafterProvenance:
    generation = Generation(
        settings=RunSettings(
            target=drafter.config.target,
            source=SourceSettings(prompts=f"{HOME}/prompts.jsonl"),
            sampling=SamplingSettings(max_tokens=256),
            engine=EngineSettings(max_model_len=1024),
            chat_template=True,
            max_prompt_tokens=512,
            held_out=0.1,
            vllm="1.0",
        ),
        prompts_sha256="0" * 64,
        versions={"vllm": "1.0"},
        prompts=PromptCounts(read=9, duplicates_dropped=0, too_long_dropped=0),
        empty_answers_dropped=0,
        splits={"train": SplitCounts(rows=1234, tokens=99999, answer_tokens=77777)},
    )
    return DrafterProvenance(
        target=TargetRecord(name="owner/target", license="apache-2.0"),
        data=DataRecord(name="answers", generation=generation),
        training=TrainingRecord(
            arguments={"layers": "own:0", "ce_weight": 0.5, "kl_weight": 0.0},
            device="cpu (x86_64)",
            started=datetime(2030, 1, 31, 10, tzinfo=timezone.utc),
            finished=datetime(2030, 1, 31, 11, 30, tzinfo=timezone.utc),
            wall_seconds=5400,
            optimizer_steps=4321,
        ),
        parent=ParentRecord(name="stage-1", config_sha256="f" * 64),
        versions={"python": "3.12.1", "torch": "2.9"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "my drafter"
