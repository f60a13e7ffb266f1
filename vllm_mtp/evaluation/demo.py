# SPDX-License-Identifier: Apache-2.0
"""The demo's measurements: the target with the method beside the target alone.

Exactness is looked at in float32, where no two tokens tie by rounding, by an engine
that always drafts all that its drafter can: what is left to the method may be no draft
at all, and would show nothing. Speed is measured in the type in which the machine is
fastest, with the number of drafts left to the method.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_mtp import engine
from vllm_mtp.data.render import Renderer
from vllm_mtp.errors import MTPError
from vllm_mtp.evaluation.attribution import Answer, StepRecord, attribute
from vllm_mtp.evaluation.engine_log import EngineLog, engine_log
from vllm_mtp.evaluation.equality import BF16_TIE_MARGIN, Comparison, compare_greedy
from vllm_mtp.evaluation.kv_cache import WORKER_EXTENSION, KVCache, read_kv_cache
from vllm_mtp.metrics import AcceptanceCounts, read_vllm_counters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_mtp.engine import LLM

EXACT = "float32"
_NO_DRAFTS = AcceptanceCounts(0, 0, ())


@dataclass(frozen=True)
class DemoPlan:
    """What to run.

    Attributes:
        target: The target's folder.
        speculative_config: As a user gives it to vLLM.
        drafter: The drafter's name, and how it was found.
        num_drafts: Tokens that the drafter was made to draft.
        question: Whose answer is shown token by token.
        prompts: User messages; the target's chat template is applied.
        choice: How the prompts were chosen, in words.
        max_tokens: Longest answer, in tokens.
        rounds: How often each side answers all prompts.
        at_once: Requests decoded at once, besides one.
        dtype: The type in which speed is measured.
    """

    target: str
    speculative_config: dict[str, Any]
    drafter: str
    num_drafts: int
    question: str
    prompts: list[str]
    choice: str
    max_tokens: int
    rounds: int
    at_once: int
    dtype: str


@dataclass(frozen=True)
class Texts:
    """Answers of both sides, compared.

    Attributes:
        dtype: In which both were computed.
        comparisons: One for each prompt.
    """

    dtype: str
    comparisons: list[Comparison]

    def count(self, verdict: str) -> int:
        return sum(item.verdict == verdict for item in self.comparisons)


@dataclass
class Speed:
    """Both sides with as many requests at once.

    Attributes:
        at_once: Requests decoded at once.
        plain: Tokens/s of the target alone, one of each round.
        drafted: The same with the method.
        tokens: That the method's side gave, all rounds together.
        counts: Its drafts, all rounds together.
        answers: Its token ids for each prompt, of the last round.
    """

    at_once: int
    plain: list[float] = field(default_factory=list)
    drafted: list[float] = field(default_factory=list)
    tokens: int = 0
    counts: AcceptanceCounts = _NO_DRAFTS
    answers: list[list[int]] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Of the rounds, the lowest first: each measures both sides in turn."""
        pairs = zip(self.drafted, self.plain, strict=True)
        return sorted(drafted / plain for drafted, plain in pairs)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def tokens_per_step(self) -> float:
        """Of each request, steps without a draft included."""
        return self.tokens / (self.tokens - self.counts.accepted_tokens)


@dataclass
class DemoResult:
    """What was measured.

    Attributes:
        exact: Answers in float32.
        fast: Answers in the type in which speed was measured.
        answer: To the plan's question, in float32, with all drafts.
        speeds: With one request, and with several at once.
        plain_cache: The target's KV cache, without the method.
        drafted_cache: The same with it.
        counts: Acceptance in all that was drafted.
    """

    exact: Texts
    fast: Texts
    answer: Answer
    speeds: list[Speed]
    plain_cache: KVCache
    drafted_cache: KVCache
    counts: AcceptanceCounts

    @property
    def is_exact(self) -> bool:
        """Whether all texts are the target's; only a tie excuses a difference."""
        in_float32 = self.exact.count("equal") == len(self.exact.comparisons)
        return in_float32 and not self.fast.count("different")

    @property
    def drafter_kv_bytes(self) -> float:
        """Bytes of KV cache per token that the engine has with the drafter only."""
        return self.drafted_cache.bytes_per_token - self.plain_cache.bytes_per_token


def run_demo(plan: DemoPlan, progress: Callable[[str], None]) -> DemoResult:
    """Start the engines, and let them answer.

    Args:
        plan: What to run.
        progress: Called with a few words before each of the `num_steps` steps.
    """
    with engine_log() as log:
        exact, record, answer = _answers_in_float32(plan, log, progress)
        with ExitStack() as engines:
            progress("starting the target alone")
            plain = engines.enter_context(_engine(plan, log, plan.dtype, None))
            progress("starting it with the drafter")
            drafted = engines.enter_context(
                _engine(plan, log, plan.dtype, plan.speculative_config)
            )
            speeds = _measure(plan, plain, drafted, progress)
            progress("comparing the texts")
            return DemoResult(
                exact=exact,
                fast=_compare(plan, plain, speeds[-1].answers),
                answer=answer,
                speeds=speeds,
                plain_cache=read_kv_cache(plain),
                drafted_cache=read_kv_cache(drafted),
                counts=sum((speed.counts for speed in speeds), record),
            )


def num_steps(plan: DemoPlan) -> int:
    """How often `run_demo` reports progress."""
    return 6 + 2 * plan.rounds


def _answers_in_float32(
    plan: DemoPlan, log: EngineLog, progress: Callable[[str], None]
) -> tuple[Texts, AcceptanceCounts, Answer]:
    """The question and a prompt, with drafts and without.

    Returns:
        How the answers compare, what was drafted, and the answer to the question.
    """
    questions = [plan.question, plan.prompts[0]]
    always = {"num_speculative_tokens": plan.num_drafts}
    progress("starting it in float32, with the drafter")
    with _engine(plan, log, EXACT, plan.speculative_config | always) as llm:
        progress("answering with drafts, and without")
        drafted = [_in_steps(llm, plan, text) for text in questions]
        answer = attribute(plan.question, drafted[0], _decoder(llm))
        if requests_choose := _requests_choose(llm):
            plain = [_in_steps(llm, plan, text, without=True) for text in questions]
    if not requests_choose:
        with _engine(plan, log, EXACT, None) as llm:
            plain = [_in_steps(llm, plan, text) for text in questions]
    if any(record.counts.drafts for record in plain):
        raise MTPError(
            "a request without drafts had some, so nothing can be said of the texts; "
            "this is a fault of vllm-mtp, please report it"
        )
    compared = [
        compare_greedy(reference.token_ids, (), other.token_ids)
        for reference, other in zip(plain, drafted, strict=True)
    ]
    counts = sum((record.counts for record in drafted), _NO_DRAFTS)
    return Texts(EXACT, compared), counts, answer


def _requests_choose(llm: "LLM") -> bool:
    """Whether a request can ask for its own number of drafts: not on every runner."""
    config = llm.llm_engine.vllm_config.speculative_config
    return getattr(config, "takes_any_length", False)


def _same(reference: StepRecord, other: StepRecord) -> Comparison:
    """No tie is accepted."""
    return compare_greedy(reference.token_ids, (), other.token_ids)


def _measure(
    plan: DemoPlan, plain: "LLM", drafted: "LLM", progress: Callable[[str], None]
) -> list[Speed]:
    # As many requests one by one as take about as long as all of them at once.
    few = plan.prompts[: max(1, len(plan.prompts) // 2)]
    loads = [(Speed(1), few), (Speed(plan.at_once), plan.prompts)]
    progress("warming up")
    for speed, prompts in loads:
        # The method learns meanwhile how long its steps take.
        for llm in (plain, drafted):
            _answer_all(llm, plan, prompts, speed.at_once)
    for number in range(1, plan.rounds + 1):
        progress(f"round {number}: the target alone")
        for speed, prompts in loads:
            answers, seconds = _answer_all(plain, plan, prompts, speed.at_once)
            speed.plain.append(sum(map(len, answers)) / seconds)
        progress(f"round {number}: with the drafter")
        for speed, prompts in loads:
            before = read_vllm_counters(drafted.get_metrics())
            answers, seconds = _answer_all(drafted, plan, prompts, speed.at_once)
            tokens = sum(map(len, answers))
            speed.drafted.append(tokens / seconds)
            speed.tokens += tokens
            speed.counts += read_vllm_counters(drafted.get_metrics()) - before
            speed.answers = answers
    return [speed for speed, _ in loads]


def _compare(plan: DemoPlan, plain: "LLM", answers: Sequence[Sequence[int]]) -> Texts:
    """The target's own answers once more, with the logprobs that show a tie.

    They take time, so no round that counts asks for them.
    """
    margin = 0.0 if plan.dtype == EXACT else BF16_TIE_MARGIN
    sampling = engine.sampling(max_tokens=plan.max_tokens, logprobs=5)
    plain.reset_prefix_cache()
    chats = plain.chat(_chats(plan.prompts), sampling, use_tqdm=False)
    references: list[Any] = [chat.outputs[0] for chat in chats]
    dtype = str(plain.llm_engine.vllm_config.model_config.dtype)
    return Texts(
        dtype.removeprefix("torch."),
        [
            compare_greedy(
                reference.token_ids,
                reference.logprobs,
                other,
                tie_margin=margin,
            )
            for reference, other in zip(references, answers, strict=True)
        ],
    )


@contextmanager
def _engine(
    plan: DemoPlan,
    log: EngineLog,
    dtype: str,
    speculative_config: dict[str, Any] | None,
) -> "Iterator[LLM]":
    with ExitStack() as engines:
        with log.taking():
            llm = engines.enter_context(
                engine.start(
                    plan.target,
                    in_process=False,
                    dtype=dtype,
                    max_model_len=2048,
                    max_num_seqs=plan.at_once,
                    gpu_memory_utilization=0.4,
                    enforce_eager=True,
                    disable_log_stats=False,
                    speculative_config=speculative_config,
                    worker_extension_cls=WORKER_EXTENSION,
                )
            )
        yield llm


def _answer_all(
    llm: "LLM", plan: DemoPlan, prompts: Sequence[str], at_once: int
) -> tuple[list[list[int]], float]:
    """Token ids for each prompt, and the seconds that all took."""
    # A cached prompt would make the second round another measurement.
    llm.reset_prefix_cache()
    sampling = engine.sampling(max_tokens=plan.max_tokens)
    # The engine itself decodes no more than `at_once` of those that it has.
    chats = _chats(prompts)
    calls = [[chat] for chat in chats] if at_once == 1 else [chats]
    start = time.perf_counter()
    answers = [
        answer for call in calls for answer in llm.chat(call, sampling, use_tqdm=False)
    ]
    seconds = time.perf_counter() - start
    return [list(answer.outputs[0].token_ids) for answer in answers], seconds


def _chats(prompts: Sequence[str]) -> list[Any]:
    return [[{"role": "user", "content": text}] for text in prompts]


def _in_steps(
    llm: "LLM", plan: DemoPlan, text: str, *, without: bool = False
) -> StepRecord:
    """Answer one message, and note what each step gave.

    Args:
        llm: An engine without other requests.
        plan: Its longest answer is taken.
        text: The message.
        without: Ask for no drafts.
    """
    settings: dict[str, Any] = {"max_tokens": plan.max_tokens}
    if without:
        settings["extra_args"] = {"num_speculative_tokens": 0}
    chat = engine.FrontEnd(llm.llm_engine.vllm_config)
    prompt_ids = Renderer(chat).token_ids_of(text)
    llm.reset_prefix_cache()
    before = read_vllm_counters(llm.get_metrics())
    llm.llm_engine.add_request(
        "one", {"prompt_token_ids": prompt_ids}, engine.sampling(**settings)
    )
    token_ids: list[int] = []
    step_sizes = []
    while llm.llm_engine.has_unfinished_requests():
        output: Any
        for output in llm.llm_engine.step():
            so_far = list(output.outputs[0].token_ids)
            step_sizes.append(len(so_far) - len(token_ids))
            token_ids = so_far
    counts = read_vllm_counters(llm.get_metrics()) - before
    return StepRecord(token_ids, step_sizes, counts)


def _decoder(llm: "LLM") -> Callable[[Sequence[int]], str]:
    tokenizer = llm.get_tokenizer()
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)
