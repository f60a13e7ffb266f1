# SPDX-License-Identifier: Apache-2.0
"""Drafts that end where the drafter is no longer sure (``min_draft_probability``)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs

from tests.serving.engines import ON_V2, Run, engine, generate, runner_of
from vllm_mtp.errors import MethodConfigError

pytestmark = pytest.mark.engine

PROMPTS = [[7] * 40, [11] * 3, [13] * 64, [17] * 90]
Spec = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def spec(tiny_drafter: Callable[[str, str], Path]) -> Spec:
    drafter = str(tiny_drafter("llama", "shared-4"))
    return lambda **settings: {"method": "mtp_placeholder", "model": drafter} | settings


def answers(llm: LLM, least: float) -> Run:
    """With another value than the engine was started with."""
    runner_of(llm).drafter._min_probability = least
    return generate(llm, PROMPTS, 24, logprobs=None)


@pytest.mark.skipif(ON_V2, reason="only for the V1 runner")
def test_the_less_likely_a_draft_may_be_the_more_are_verified(
    tiny_targets: dict[str, Path], spec: Spec
) -> None:
    with engine(tiny_targets["llama"], spec(min_draft_probability=1.0)) as llm:
        assert runner_of(llm).drafter._min_probability == 1.0
        # A random target is sure of nothing: its first choice has some 0.01.
        runs = [answers(llm, least) for least in (1.0, 0.02, 0.002, 1e-6, 1e-30, 0.0)]
    with engine(tiny_targets["llama"], None) as llm:
        alone = generate(llm, PROMPTS, 24, logprobs=None)
    assert all(run.token_ids == alone.token_ids for run in runs)
    drafted = [run.counts.draft_tokens for run in runs]
    assert drafted == sorted(drafted)
    assert drafted[0] == 0
    assert len(set(drafted)) >= 4, "cut at different positions"
    assert runs[-2].counts == runs[-1].counts
    assert runs[-1].counts.draft_tokens == 4 * runs[-1].counts.drafts


@pytest.mark.parametrize(
    "settings",
    [
        {"draft_sample_method": "probabilistic"},
        {"tensor_parallel_size": 2},
        {"runner": "1"},
    ],
)
def test_it_is_refused_where_drafts_have_one_length(
    tiny_targets: dict[str, Path],
    spec: Spec,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    if "runner" in settings:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", settings.pop("runner"))
    flags = {k: settings.pop(k) for k in ("tensor_parallel_size",) if k in settings}
    args = EngineArgs(
        model=str(tiny_targets["llama"]),
        skip_tokenizer_init=True,
        speculative_config=spec(min_draft_probability=0.1, **settings),
        **flags,
    )
    with pytest.raises(MethodConfigError, match="min_draft_probability: got 0.1"):
        args.create_engine_config()
