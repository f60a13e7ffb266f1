# SPDX-License-Identifier: Apache-2.0
"""Two ranks that share the target and the drafter serve what one process serves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from vllm import LLM

from tests.serving.conftest import PLAIN
from tests.serving.engines import ON_V2, Run, engine, generate, of_each_runner
from tests.tiny_targets import make_tiny_llama
from vllm_mtp.drafter.checkpoint import save_drafter
from vllm_mtp.torch_host.new_drafter import new_drafter

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

# None leaves a single token behind a prefix-cache hit: vLLM pads such a request with
# drafts that nobody made, and counts them.
PROMPTS = [[(37 * i + 11 * n) % 512 for i in range(n)] for n in (70, 40, 5, 48)]
# Ranks wait for each other some twenty times per token, each time for the slowest.
MAX_TOKENS = 12

# The target's layers, all of them: every first draft is accepted.
EXACT = ["shared-1", "own-1", "one-kv-head"]
# Two workers take half a minute to start: `pytest -m slow` runs the others.
SLOW = [*EXACT, "heads", "block", "chain-all", "position-layers", "full-rank"]
CASES = ["mixed", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@contextmanager
def two_ranks(target: Path, spec: dict[str, Any] | None) -> Iterator[LLM]:
    """An engine in this process, its two workers in processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of each
        with engine(target, spec, tensor_parallel_size=2) as llm:
            yield llm


class Part(NamedTuple):
    """What one rank has of the drafter, and what it drafted last."""

    weights: dict[str, tuple[int, ...]]
    head: tuple[int, ...] | None
    drafts: list[list[int]]


def part_of_rank(runner: Any) -> Part:
    drafter = runner.speculator if ON_V2 else runner.drafter
    drafts = drafter.draft_tokens if ON_V2 else runner._draft_token_ids
    bound = drafter._bound
    return Part(
        {name: tuple(w.shape) for name, w in bound.drafter.named_parameters()},
        None if bound.small_head is None else tuple(bound.small_head.weight.shape),
        drafts.tolist(),
    )


class Runs(NamedTuple):
    """The same requests twice."""

    greedy: Run
    sampled: Run


class Sides(NamedTuple):
    """The same requests with one drafter, in one process and in two ranks."""

    case: str
    plain: Run  # two ranks, without the method
    one: Runs
    two: Runs
    parts: list[Part]
    replaced: Run  # two ranks, the drafter replaced by itself


@pytest.fixture(scope="module")
def one_kv_head(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target with one KV head, which both ranks keep, and its exact drafter."""
    root = tmp_path_factory.mktemp("one-kv-head")
    target = make_tiny_llama(root / "target", num_key_value_heads=1)
    return target, save_drafter(
        new_drafter(target, "own:all", 1, PLAIN), root / "drafter"
    )


def answer(llm: LLM) -> Runs:
    # Triton's interpreter cannot sample (v2_cases.py).
    temperature = 0.0 if ON_V2 else 1.0
    return Runs(
        generate(llm, PROMPTS, MAX_TOKENS),
        generate(llm, PROMPTS, MAX_TOKENS, temperature=temperature),
    )


plain_runs: dict[Path, Run] = {}


@pytest.fixture(scope="module", params=CASES)
def sides(
    request: pytest.FixtureRequest,
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
    one_kv_head: tuple[Path, Path],
) -> Sides:
    case = request.param
    if case == "one-kv-head":
        target, folder = one_kv_head
    else:
        target, folder = tiny_targets["llama"], tiny_drafter("llama", case)
    spec = {"method": "mtp_placeholder", "model": str(folder)}
    if not ON_V2:
        spec["draft_sample_method"] = "probabilistic"
    # First: behind an engine of two workers, vLLM does not replace the Triton kernels
    # of this process, which a CPU has none for.
    with engine(target, spec) as llm:
        one = answer(llm)
    if target not in plain_runs:
        with two_ranks(target, None) as llm:
            plain_runs[target] = generate(llm, PROMPTS, MAX_TOKENS)
    with two_ranks(target, spec) as llm:
        two = answer(llm)
        parts = of_each_runner(llm, part_of_rank)
        for refused in llm.collective_rpc("replace_drafter", args=("/nonexistent",)):
            assert refused["drafter"] == str(folder)
            assert "no such folder" in refused["error"]
        taken = {"drafter": str(folder), "error": None}
        answers = llm.collective_rpc("replace_drafter", args=(str(folder),))
        assert answers == [taken, taken]
        replaced = generate(llm, PROMPTS, MAX_TOKENS)
    return Sides(case, plain_runs[target], one, two, parts, replaced)


def test_outputs_are_those_of_two_ranks_without_the_method(sides: Sides) -> None:
    assert sides.two.greedy.token_ids == sides.plain.token_ids


def test_two_ranks_draft_and_accept_what_one_process_does(sides: Sides) -> None:
    for one, two in zip(sides.one, sides.two, strict=True):
        assert two.token_ids == one.token_ids
        assert two.counts == one.counts
        assert two.counts.drafts > 0
        if sides.case in EXACT:
            assert two.counts.acceptance_rate == 1.0
    # An untrained drafter is right by chance, if at all.
    assert sum(run.counts.accepted_tokens for run in sides.two) > 0


def test_both_ranks_take_another_drafter_or_neither(sides: Sides) -> None:
    assert sides.replaced.token_ids == sides.two.greedy.token_ids
    assert sides.replaced.counts == sides.two.greedy.counts


def test_both_ranks_draft_the_same_tokens(sides: Sides) -> None:
    first, second = (part.drafts for part in sides.parts)
    assert first == second
    assert first  # of the last step, which may have had one request


def test_each_rank_holds_its_part_of_the_weights(sides: Sides) -> None:
    assert len(sides.parts) == 2
    for weights, head, _ in sides.parts:
        if sides.case == "mixed":
            assert head == (128, 64)  # of 256 tokens
            assert weights["layers.0.lora.q_proj.b"] == (64, 4)
            assert weights["layers.0.lora.o_proj.a"] == (4, 64)
            assert weights["layers.2.k_proj.weight"] == (32, 64)
            assert weights["layers.3.down_proj.weight"] == (64, 48)
            assert weights["markov.unembed.weight"] == (256, 8)  # whole
        elif sides.case in ("own-1", "one-kv-head"):
            assert weights["layers.0.q_proj.weight"] == (64, 64)
            assert weights["layers.0.k_proj.weight"] == (32, 64)
