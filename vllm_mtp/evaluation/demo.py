# SPDX-License-Identifier: Apache-2.0
"""The demo's measurement: one target, without and with the method, side by side."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_mtp import engine
from vllm_mtp.evaluation.equality import BF16_TIE_MARGIN, Comparison, compare_greedy
from vllm_mtp.metrics import AcceptanceCounts, read_vllm_counters

if TYPE_CHECKING:
    from vllm_mtp.engine import LLM


@dataclass(frozen=True)
class DemoPlan:
    """What to run.

    Attributes:
        target: The target's folder.
        speculative_config: As a user gives it to vLLM.
        prompts: User messages; the target's chat template is applied.
        max_tokens: Longest answer, in tokens.
        rounds: How often each side answers all prompts.
        concurrency: Requests decoded at once.
    """

    target: str
    speculative_config: dict[str, Any]
    prompts: list[str]
    max_tokens: int
    rounds: int
    concurrency: int


@dataclass
class Side:
    """One engine and what was measured on it."""

    llm: "LLM"
    tokens_per_s: list[float] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    counts: AcceptanceCounts = AcceptanceCounts(0, 0, ())

    @property
    def kv_blocks(self) -> int:
        """Blocks in the KV pool."""
        return self.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks or 0

    @property
    def kv_block_tokens(self) -> int:
        """Tokens per block."""
        return self.llm.llm_engine.vllm_config.cache_config.block_size


@dataclass(frozen=True)
class DemoResult:
    """Both sides, and the comparison of their last round's outputs."""

    plain: Side
    drafted: Side
    comparisons: list[Comparison]

    def count(self, verdict: str) -> int:
        return sum(item.verdict == verdict for item in self.comparisons)

    @property
    def speed_ratio(self) -> float:
        """Median of the rounds' ratios: each round measures both sides in turn."""
        pairs = zip(self.drafted.tokens_per_s, self.plain.tokens_per_s, strict=True)
        return statistics.median(drafted / plain for drafted, plain in pairs)


def run_demo(plan: DemoPlan, progress: Callable[[str], None]) -> DemoResult:
    """Start both engines and let them answer in turns.

    Args:
        plan: What to run.
        progress: Called with a few words before each of the `num_steps` steps.
    """
    with ExitStack() as engines:
        progress("starting the target")
        plain = Side(engines.enter_context(_engine(plan, None)))
        progress("starting the target with the drafter")
        drafted = Side(engines.enter_context(_engine(plan, plan.speculative_config)))
        progress("warming up")
        for side in (plain, drafted):
            _answer(side, plan, warm_up=True)
        for number in range(plan.rounds):
            progress(f"round {number + 1}: target alone")
            _answer(plain, plan)
            progress(f"round {number + 1}: with the drafter")
            _answer(drafted, plan)
    comparisons = [
        compare_greedy(
            reference.token_ids,
            reference.logprobs,
            other.token_ids,
            tie_margin=BF16_TIE_MARGIN,
        )
        for reference, other in zip(plain.outputs, drafted.outputs, strict=True)
    ]
    return DemoResult(plain, drafted, comparisons)


def num_steps(plan: DemoPlan) -> int:
    """How often `run_demo` reports progress."""
    return 3 + 2 * plan.rounds


def _engine(
    plan: DemoPlan, speculative_config: dict[str, Any] | None
) -> "AbstractContextManager[LLM]":
    return engine.start(
        plan.target,
        in_process=False,
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=plan.concurrency,
        gpu_memory_utilization=0.4,
        enforce_eager=True,
        disable_log_stats=False,
        speculative_config=speculative_config,
    )


def _answer(side: Side, plan: DemoPlan, *, warm_up: bool = False) -> None:
    chats: list[Any] = [[{"role": "user", "content": text}] for text in plan.prompts]
    # Logprobs tell a float tie from a difference; both sides compute them.
    params = engine.sampling(max_tokens=plan.max_tokens, logprobs=5)
    if warm_up:
        side.llm.chat(chats[:1], params, use_tqdm=False)
        return
    # A cached prompt would make the second round another measurement.
    side.llm.reset_prefix_cache()
    before = read_vllm_counters(side.llm.get_metrics())
    start = time.perf_counter()
    answers = side.llm.chat(chats, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    side.outputs = [answer.outputs[0] for answer in answers]
    tokens = sum(len(output.token_ids) for output in side.outputs)
    side.tokens_per_s.append(tokens / seconds)
    side.counts += read_vllm_counters(side.llm.get_metrics()) - before
