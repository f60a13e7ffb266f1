# SPDX-License-Identifier: Apache-2.0
"""The drafter's layers, compiled where vLLM compiles the target."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from vllm import LLM
from vllm.config import CompilationMode

from tests.serving.engines import ON_V2, bound_drafter_of, engine, generate
from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.layers import BlockRows
from vllm_mtp.serving.compiled import compile_layers

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(ON_V2, reason="V2 compiles nothing under the interpreter"),
]

# Alone, a batch that grows and shrinks, a prompt whose block is cut at the limit.
PROMPTS = [[7] * 40, [11] * 3, [13] * 64, [17] * 90, [19] * 250]


@pytest.fixture(scope="module")
def compiled(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> Iterator[LLM]:
    spec = {"method": "mtp_placeholder", "model": str(tiny_drafter("llama", "mixed"))}
    with engine(tiny_targets["llama"], spec, enforce_eager=False) as llm:
        yield llm


@contextmanager
def uncompiled(bound: BoundDrafter) -> Iterator[None]:
    runner = bound.layers_runner
    bound.layers_runner = bound._run_layers
    try:
        yield
    finally:
        bound.layers_runner = runner


def test_drafts_what_it_drafts_uncompiled(compiled: LLM) -> None:
    bound = bound_drafter_of(compiled)
    fast = [generate(compiled, PROMPTS[:n], 24) for n in (1, 5)]
    with uncompiled(bound):
        slow = [generate(compiled, PROMPTS[:n], 24) for n in (1, 5)]
    for one, other in zip(fast, slow, strict=True):
        assert one.token_ids == other.token_ids
        assert one.counts == other.counts
        assert one.counts.accepted_tokens > 0


def test_hidden_states_are_the_same_up_to_rounding(compiled: LLM) -> None:
    bound = bound_drafter_of(compiled)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    fast = bound.layers_runner

    def both(*rows: Any) -> torch.Tensor:
        seen.append((fast(*rows).clone(), bound._run_layers(*rows)))
        return seen[-1][0]

    bound.layers_runner = both
    try:
        generate(compiled, PROMPTS, 8)
    finally:
        bound.layers_runner = fast
    assert len(seen) > 3
    for ours, theirs in seen:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_is_compiled_before_the_first_request(compiled: LLM) -> None:
    """And for every batch size at once: compiling takes seconds."""
    before = counters["stats"]["unique_graphs"]
    assert before >= 2, "the target and the drafter"
    for count in range(1, len(PROMPTS) + 1):
        generate(compiled, PROMPTS[:count], 8)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize(
    ("mode", "eager", "expected"),
    [
        (CompilationMode.DYNAMO_TRACE_ONCE, None, True),
        (CompilationMode.VLLM_COMPILE, False, True),
        (CompilationMode.NONE, None, False),
        (CompilationMode.DYNAMO_TRACE_ONCE, True, False),
    ],
)
def test_only_where_the_target_is_compiled(
    mode: CompilationMode, eager: bool | None, expected: bool
) -> None:
    def uncompiled_runner() -> None: ...

    bound = bound_with(uncompiled_runner)
    config: Any = SimpleNamespace(
        compilation_config=SimpleNamespace(mode=mode),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        speculative_config=SimpleNamespace(enforce_eager=eager),
    )
    compile_layers(bound, config)
    assert (bound.layers_runner is not uncompiled_runner) == expected


def bound_with(layers_runner: Callable[..., Any]) -> Any:
    """What `compile_layers` looks at of a drafter."""
    config = SimpleNamespace(
        num_speculative_tokens=4, layers=(), target=SimpleNamespace(hidden_size=64)
    )
    return SimpleNamespace(
        layers_runner=layers_runner, drafter=SimpleNamespace(config=config)
    )


def compiling_config(max_num_seqs: int) -> Any:
    """A vLLM config that has the target compiled."""
    return SimpleNamespace(
        compilation_config=SimpleNamespace(mode=CompilationMode.DYNAMO_TRACE_ONCE),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        speculative_config=None,
    )


def test_what_cannot_be_compiled_runs_uncompiled(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target may be compilable where our view of its layers is not."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    calls = []

    def run(embedded: torch.Tensor, *_: Any) -> torch.Tensor:
        calls.append(len(embedded))
        torch._dynamo.graph_break()  # which a whole graph cannot have
        return embedded + 1

    bound = bound_with(run)
    compile_layers(bound, compiling_config(max_num_seqs=8))
    rows = torch.zeros(3, 2)
    with caplog.at_level(logging.WARNING, "vllm.mtp_placeholder"):
        for _ in range(2):
            found = bound.layers_runner(rows, torch.zeros(3), None, rows, BlockRows(3))
            assert found.eq(1).all()
    assert calls == [3, 3]
    said = [record.getMessage() for record in caplog.records]
    # Twice in the list where two handlers see it.
    assert len({text for text in said if "layers are not compiled: " in text}) == 1


def test_the_first_number_of_rows_may_be_the_width() -> None:
    """256 requests with 4 drafts on a target 1024 wide, for one."""
    linear = torch.nn.Linear(64, 64).requires_grad_(False)

    def run(embedded: torch.Tensor, positions: torch.Tensor, *_: Any) -> torch.Tensor:
        return linear(embedded + positions[:, None])

    bound = bound_with(run)
    compile_layers(bound, compiling_config(max_num_seqs=16))
    assert bound.layers_runner is not run
    with torch.inference_mode():
        for count in (64, 10, 96, 64):
            gate = torch.ones(count, 1)
            rows = torch.randn(count, 64), torch.arange(count), None, gate
            found = bound.layers_runner(*rows, BlockRows(4))
            torch.testing.assert_close(found, run(*rows))
