# SPDX-License-Identifier: Apache-2.0
"""What a window on the prefix is worth behind long contexts.

    python -m tools.windows --contexts 2048 7680 --windows 256 1024

One engine in this process (V1, CPU), whose drafter is told another window from turn to
turn. The prompts stay in the prefix cache, so decoding is timed, and a prefill of the
last 128 tokens at most. Start it with the settings that `vllm-mtp doctor` names and
with room for all prompts of a context (VLLM_CPU_KVCACHE_SPACE).
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tools.command import Parser, count
from vllm_mtp import engine
from vllm_mtp.bench.loads import context_loads
from vllm_mtp.bench.plan import Load
from vllm_mtp.bench.report import spread_text
from vllm_mtp.bench.summary import Spread
from vllm_mtp.data.demo_target import ensure_demo_target
from vllm_mtp.data.unseen import choice_in_words, unseen_prompts
from vllm_mtp.drafter.checkpoint import read_config
from vllm_mtp.drafter.layout import WINDOW_STEP
from vllm_mtp.engine import tokenizer_of
from vllm_mtp.installed import installed_folder
from vllm_mtp.markdown import row as row_of_table
from vllm_mtp.markdown import table
from vllm_mtp.metrics import AcceptanceCounts, read_vllm_counters
from vllm_mtp.plugin import METHOD
from vllm_mtp.sharing.provenance import training_prompts

if TYPE_CHECKING:
    from vllm_mtp.engine import LLM

ALL = None  # the whole prefix
_TEXTS = 200
HEAD = ("Context", "Window", "AL", "ms per step", "Tokens/s over those without")


@dataclass(frozen=True)
class Turn:
    """All prompts of a context, once, with one window."""

    window: int | None
    counts: AcceptanceCounts
    tokens: int
    seconds: float

    @property
    def ms_per_step(self) -> float:
        return self.seconds * 1e3 / self.counts.drafts


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--contexts", type=count, nargs="+", default=[2048, 4096, 7680])
    parser.add_argument("--windows", type=count, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--prompts", type=count, default=8, help="of each context")
    parser.add_argument("--max-tokens", type=count, default=80)
    parser.add_argument("--rounds", type=count, default=3)
    options = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    target = ensure_demo_target()
    cheap = installed_folder("cheap")  # what the engine takes, too
    known = [training_prompts(cheap)]
    print(f"Prompts: {choice_in_words(known)}\n")
    loads = context_loads(
        tokenizer_of(target),
        unseen_prompts(_TEXTS, known, max_chars=1000),
        options.contexts,
        options.max_tokens,
        options.prompts,
    )
    longest = max(options.contexts) + options.max_tokens + 128
    with engine.start(
        target,
        cache_gib=4,
        enforce_eager=False,
        max_model_len=longest,
        max_num_seqs=1,
        disable_log_stats=False,
        speculative_config={
            "method": METHOD,
            "num_speculative_tokens": read_config(cheap).num_speculative_tokens,
        },
    ) as llm:
        _print_table(Engine(llm), loads, options)
    return 0


def _print_table(
    engine: "Engine", loads: Iterable[Load], options: argparse.Namespace
) -> None:
    print(table(HEAD, ()))
    for load in loads:
        turns = measure(engine, load, [ALL, *options.windows], options.rounds)
        for row in rows_of(load.name, turns):
            print(row_of_table(row), flush=True)


class Engine:
    """vLLM with the demo's drafter."""

    def __init__(self, llm: "LLM") -> None:
        self._llm, self._drafter = llm, engine.drafter_of(llm)

    def turn(self, load: Load, window: int | None, max_tokens: int) -> Turn:
        """Answer all prompts, one after the other."""
        self._drafter.prefix_window = window
        sampling = engine.sampling(max_tokens=max_tokens)
        chats: list[Any] = [[{"role": "user", "content": p}] for p in load.prompts]
        cached = self._prompt_tokens_cached()
        before, start = self._counts(), time.perf_counter()
        answers = [self._llm.chat(chat, sampling, use_tqdm=False)[0] for chat in chats]
        seconds = time.perf_counter() - start
        tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
        prompts = sum(len(answer.prompt_token_ids or ()) for answer in answers)
        missing = prompts - (self._prompt_tokens_cached() - cached)
        # Of each prompt, the last block or two.
        if max_tokens > 1 and missing > 2 * WINDOW_STEP * len(chats):
            raise SystemExit(
                f"{load.name}: the prefix cache does not hold the prompts ({prompts:,} "
                "tokens); give it more room: VLLM_CPU_KVCACHE_SPACE"
            )
        return Turn(window, self._counts() - before, tokens, seconds)

    def _prompt_tokens_cached(self) -> int:
        """Prompt tokens found in the prefix cache so far."""
        name = "vllm:prefix_cache_hits"
        found: list[Any] = [m for m in self._llm.get_metrics() if m.name == name]
        return sum(int(metric.value) for metric in found)

    def _counts(self) -> AcceptanceCounts:
        return read_vllm_counters(self._llm.get_metrics())


def measure(
    engine: Engine, load: Load, windows: Sequence[int | None], rounds: int
) -> list[Turn]:
    """Every window in every round, in an order that turns round."""
    engine.turn(load, ALL, 1)  # fills the prefix cache
    return [
        engine.turn(load, window, load.output_tokens)
        for number in range(rounds)
        for window in windows[:: -1 if number % 2 else 1]
    ]


def rows_of(name: str, turns: Iterable[Turn]) -> list[tuple[str, ...]]:
    """A row for each window; the first turns of all of them are one round."""
    by_window: dict[int | None, list[Turn]] = {}
    for turn in turns:
        by_window.setdefault(turn.window, []).append(turn)
    return [_row(name, own, by_window[ALL]) for own in by_window.values()]


def _row(name: str, own: list[Turn], whole: list[Turn]) -> tuple[str, ...]:
    counts = sum((turn.counts for turn in own), AcceptanceCounts(0, 0, ()))
    ratios = [
        (turn.tokens / turn.seconds) / (base.tokens / base.seconds)
        for turn, base in zip(own, whole, strict=True)
    ]
    return (
        name,
        "all" if own[0].window is None else f"{own[0].window:,}",
        f"{counts.acceptance_length:.3f}",
        f"{statistics.median(turn.ms_per_step for turn in own):.1f}",
        spread_text(Spread.of(ratios)),
    )


if __name__ == "__main__":
    sys.exit(main())
