# SPDX-License-Identifier: Apache-2.0
"""A drafter that fails while it serves: the answers are the target's, and no request
sees anything of it. On either runner."""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from vllm.sampling_params import StructuredOutputsParams

from tests.serving.async_scheduling import force_async_scheduling
from tests.serving.engines import (
    ON_V2,
    Run,
    bound_drafter_of,
    counters,
    engine,
    generate,
    runner_of,
)
from tests.serving.test_distribution import (
    BATCH,
    LIMIT,
    NUM_SAMPLES,
    PROMPT,
    chi_squared,
    draw_second_tokens,
    second_token,
)
from tests.tiny_targets import VOCAB_SIZE
from tests.tiny_tokenizer import save_tiny_tokenizer
from vllm_mtp.serving.faults import (
    COUNTER_NAME,
    FILLER_TOKEN,
    MAX_FAILURES,
    DraftGuard,
)

LOGGER = "vllm.mtp_placeholder"
# Long prompts in small pieces, beside requests that decode.
CHUNKS = {"max_num_batched_tokens": 64, "max_num_seqs": 4}
LENGTHS = [100, 30, 70] if ON_V2 else [150, 30, 151, 97, 200, 10]
PROMPTS = [[(7 * i + 3 * j) % 512 for i in range(n)] for j, n in enumerate(LENGTHS)]
MAX_TOKENS = 8 if ON_V2 else 30
PENALTY = {"repetition_penalty": 1.3}
# With penalties, vLLM also reads the drafts on the host; a grammar checks them.
WAYS: list[dict[str, Any]] = [
    {},
    PENALTY,
    {"structured_outputs": StructuredOutputsParams(regex="[a-f]([0-9]|[a-f]{2}){200}")},
]


class Injected(RuntimeError):
    """Nothing that the code raises itself."""


class Faults:
    """Make a bound drafter fail in the middle of its layers."""

    def __init__(self, bound: Any) -> None:
        self.calls = 0  # of the drafter's forward
        self.at: Callable[[int], bool] = lambda _: False
        target, forward = bound.target, bound.forward
        middle = len(bound.drafter.config.bound_layers) // 2

        def counted(*args: Any) -> Any:
            self.calls += 1
            return forward(*args)

        def failing(name: str) -> Callable[..., Any]:
            original = getattr(target, name)

            def run(*args: Any) -> Any:
                index = next(a for a in args if type(a) is int)
                if index == middle and self.at(self.calls):
                    raise Injected(f"call {self.calls}")
                return original(*args)

            return run

        bound.forward = counted
        target.run_layer = failing("run_layer")  # of shared layers
        target.attend = failing("attend")  # of own layers


def guard_of(llm: Any) -> DraftGuard:
    runner = runner_of(llm)
    return (runner.speculator if ON_V2 else runner.drafter).faults


@contextmanager
def drafting(
    tiny_drafter: Callable[[str, str], Path],
    target: Path,
    name: str = "shared-4",
    **settings: Any,
) -> Iterator[tuple[Any, Faults]]:
    spec: dict[str, Any] = {
        "method": "mtp_placeholder",
        "model": str(tiny_drafter("llama", name)),
        **settings.pop("spec", {}),
    }
    with engine(target, spec, **settings) as llm:
        yield llm, Faults(bound_drafter_of(llm))


@pytest.fixture(autouse=True)
def _log_reaches_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)


# V2 verifies fillers in either case.
@pytest.fixture(
    params=[
        pytest.param("planned", marks=pytest.mark.slow if ON_V2 else ()),
        "ahead",
    ]
)
def scheduling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "ahead":
        force_async_scheduling(monkeypatch)
    return request.param


plain_runs: list[list[list[int]]] = []


@pytest.fixture(scope="module")
def llama(
    tiny_targets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A target with a tokenizer, which a grammar needs."""
    folder = tmp_path_factory.mktemp("with-tokenizer") / "llama"
    shutil.copytree(tiny_targets["llama"], folder)
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture
def plain(llama: Path) -> list[list[list[int]]]:
    """The target alone, in each of `WAYS`."""
    if not plain_runs:
        with engine(llama, **CHUNKS) as llm:
            runs = [generate(llm, PROMPTS, MAX_TOKENS, **way) for way in WAYS]
        assert runs[0].chunked > 0
        plain_runs.extend(run.token_ids for run in runs)
    return plain_runs


def all_ways(llm: Any) -> list[Run]:
    return [generate(llm, PROMPTS, MAX_TOKENS, **way) for way in WAYS]


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == LOGGER and record.levelno == level
    ]


@pytest.mark.engine
def test_one_failure_costs_one_step(
    plain: list[list[list[int]]],
    scheduling: str,
    llama: Path,
    tiny_drafter: Callable[[str, str], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = CHUNKS | {"enable_prefix_caching": False}
    with drafting(tiny_drafter, llama, **settings) as (llm, faults):
        before = all_ways(llm)
        # In the middle of the first way, and of the last.
        half = faults.calls // (2 * len(WAYS))
        failing = [faults.calls + half, 2 * faults.calls - half]
        faults.at = lambda call: call in failing
        during = all_ways(llm)
        after = all_ways(llm)
        guard = guard_of(llm)
    for runs in (before, during, after):
        assert [run.token_ids for run in runs] == plain
    assert (guard.failures, guard.is_off) == (2, False)
    assert [run.counts for run in after] == [run.counts for run in before]
    accepted = during[0].counts.accepted_tokens
    assert 0 < accepted < before[0].counts.accepted_tokens
    (error,) = messages(caplog, logging.ERROR)
    assert f"Injected: call {failing[0]}" in error
    assert not messages(caplog, logging.WARNING)


@pytest.mark.engine
def test_speculation_stays_off_after_too_many_failures(
    plain: list[list[list[int]]],
    scheduling: str,
    llama: Path,
    tiny_drafter: Callable[[str, str], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with drafting(tiny_drafter, llama, **CHUNKS) as (llm, faults):
        faults.at = lambda _: True
        runs = all_ways(llm)
        faults.at = lambda _: False  # too late
        late = all_ways(llm)
        guard = guard_of(llm)
        visible = {m.name: m.value for m in llm.get_metrics() if m.name == COUNTER_NAME}
    for answers in (runs, late):
        assert [run.token_ids for run in answers] == plain
    assert faults.calls == guard.failures == MAX_FAILURES
    assert guard.is_off
    assert visible[COUNTER_NAME] >= MAX_FAILURES  # of this process
    if ON_V2 or scheduling == "ahead":
        assert late[0].counts.accepted_tokens < late[0].counts.drafts / 10  # fillers
    else:
        assert late[0].counts.drafts == 0
    assert len(messages(caplog, logging.ERROR)) == 1
    (warning,) = messages(caplog, logging.WARNING)
    assert f"stays off after {MAX_FAILURES} failures" in warning


@pytest.mark.engine
@pytest.mark.skipif(not ON_V2, reason="V1 drops the probabilities with the drafts")
def test_fillers_are_certain(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    """What vLLM reads beside a draft, where earlier drafts were sampled."""
    with drafting(
        tiny_drafter,
        tiny_targets["llama"],
        "mixed",
        spec={"draft_sample_method": "probabilistic"},
    ) as (llm, faults):
        generate(llm, [PROMPT] * 2, 4, temperature=1.0)
        speculator = runner_of(llm).speculator
        used = speculator.draft_logits.flatten(1).ne(0).any(dim=1)
        assert used.sum() == 2  # requests
        faults.at = lambda _: True
        generate(llm, [PROMPT] * 2, 4, temperature=1.0)
        tokens = speculator.draft_tokens[:2]
        logits = speculator.draft_logits[used]
    assert (tokens == FILLER_TOKEN).all()
    filler = torch.full((VOCAB_SIZE,), FILLER_TOKEN) == torch.arange(VOCAB_SIZE)
    assert torch.equal(logits.softmax(-1), filler.float().expand_as(logits))


@pytest.mark.engine
@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
@(pytest.mark.slow if ON_V2 else pytest.mark.engine)
def test_fillers_do_not_change_how_tokens_are_drawn(
    method: str,
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They were certain, so no distribution of earlier drafts may stand beside them."""
    force_async_scheduling(monkeypatch)
    with drafting(
        tiny_drafter,
        tiny_targets["llama"],
        "mixed",
        max_num_seqs=BATCH,
        spec={"draft_sample_method": method},
    ) as (llm, faults):
        drafted = generate(llm, [PROMPT] * BATCH, 4, temperature=1.0)
        assert drafted.counts.accepted_tokens > 0
        faults.at = lambda _: True
        before = counters(llm)[0]
        tokens = draw_second_tokens(llm)
        counts = counters(llm)[0] - before
        assert guard_of(llm).is_off
    assert counts.drafts >= NUM_SAMPLES
    assert chi_squared(tokens, second_token(tiny_targets["llama"], 1.0)) < LIMIT


# The guard alone.


def test_failures_count_in_all_and_are_told_twice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    published = REGISTRY.get_sample_value(f"{COUNTER_NAME}_total") or 0
    guard = DraftGuard(alone=True)
    for failures in range(1, MAX_FAILURES + 1):
        assert not guard.is_off
        guard.survive(ValueError(f"fault {failures}"))
        assert guard.failures == failures
    assert guard.is_off
    first, off = (r for r in caplog.records if r.name == LOGGER)
    assert first.levelno == logging.ERROR
    assert "ValueError: fault 1" in first.getMessage()
    assert first.exc_info is not None
    assert off.levelno == logging.WARNING
    assert f"fault {MAX_FAILURES}" in off.getMessage()
    now = REGISTRY.get_sample_value(f"{COUNTER_NAME}_total") or 0
    assert now == published + MAX_FAILURES


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access"),
    ],
    ids=repr,
)
def test_what_goes_on_and_ends_the_engine(error: Exception) -> None:
    guard = DraftGuard(alone=True)
    with pytest.raises(type(error)) as caught:
        guard.survive(error)
    assert caught.value is error
    assert guard.failures == 0


def test_one_rank_of_several_fails_as_vllm_fails() -> None:
    guard = DraftGuard(alone=False)
    with pytest.raises(Injected):
        guard.survive(Injected())
    assert guard.failures == 0
