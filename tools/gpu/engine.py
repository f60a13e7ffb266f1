# SPDX-License-Identifier: Apache-2.0
"""One side of a comparison as an engine in this process."""

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sides import speculative_config
from vllm import LLM, SamplingParams

from vllm_mtp.engine import core_of
from vllm_mtp.metrics import AcceptanceCounts


@dataclass
class Answers:
    """What one call gave."""

    outputs: list[Any]
    counts: AcceptanceCounts
    seconds: float


class Side:
    """A target with one way to draft for it.

    Args:
        name: As in `sides`.
        target: The target's folder.
        num_tokens: Tokens to draft per step.
        work: Folder for drafters that are made here.
        settings: Of vLLM's ``LLM``.
    """

    def __init__(
        self, name: str, target: Path, num_tokens: int, work: Path, **settings: Any
    ) -> None:
        begin = time.perf_counter()
        self.name = name
        self.llm = LLM(
            str(target),
            speculative_config=speculative_config(name, target, num_tokens, work),
            seed=0,
            skip_tokenizer_init=True,
            disable_log_stats=False,
            use_tqdm_on_load=False,
            **settings,
        )
        self.config = self.llm.llm_engine.vllm_config
        speculative = self.config.speculative_config
        self.num_tokens = speculative.num_speculative_tokens if speculative else 0
        self._drafts: list[tuple[int, int]] = []
        self._record_drafts()
        print(f"{name}: started in {time.perf_counter() - begin:.0f} s", flush=True)

    @property
    def kv_blocks(self) -> int:
        return self.config.cache_config.num_gpu_blocks or 0

    @property
    def capacity(self) -> int:
        """Tokens that the KV pool holds."""
        return self.kv_blocks * self.config.cache_config.block_size

    def answer(
        self, prompts: list[list[int]], max_tokens: int, logprobs: int | None = None
    ) -> Answers:
        """Greedy outputs of exactly ``max_tokens`` tokens."""
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=logprobs,
        )
        self._drafts.clear()
        begin = time.perf_counter()
        answers = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False
        )
        seconds = time.perf_counter() - begin
        outputs = [answer.outputs[0] for answer in answers]
        return Answers(outputs, counts_of(self._drafts), seconds)

    def _record_drafts(self) -> None:
        """Keep how many tokens of each draft were accepted.

        vLLM's own counters belong to the process: only the engine that was started
        last has any.
        """
        scheduler = core_of(self.llm).scheduler
        original = scheduler.make_spec_decoding_stats

        def recording(*args: Any, **kwargs: Any) -> Any:
            drafted, accepted = (
                kwargs["num_draft_tokens"],
                kwargs["num_accepted_tokens"],
            )
            if drafted:
                self._drafts.append((drafted, accepted))
            return original(*args, **kwargs)

        scheduler.make_spec_decoding_stats = recording

    def stop(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def counts_of(drafts: list[tuple[int, int]]) -> AcceptanceCounts:
    """Counters of drafts, each given as its tokens and how many were accepted."""
    width = max((drafted for drafted, _ in drafts), default=0)
    positions = tuple(sum(n > i for _, n in drafts) for i in range(width))
    return AcceptanceCounts(len(drafts), sum(d for d, _ in drafts), positions)


def start_all(
    names: list[str], memory: float, *args: Any, **settings: Any
) -> tuple[list[Side], list[dict[str, Any]]]:
    """Start sides that share the device's memory.

    A side that does not start is a result too, so the others go on.

    Args:
        names: The sides.
        memory: Share of the device's memory for all of them.
        args: As `Side` takes them after the name.
        settings: As `Side` takes them.

    Returns:
        The sides that run, and a row of the report for each of the others.
    """
    sides, failures = [], []
    for name in names:
        try:
            share = memory / len(names)
            sides.append(Side(name, *args, gpu_memory_utilization=share, **settings))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:600]
            failures.append({"side": name, "failed": reason})
            print(f"{name}: {reason}", flush=True)
            gc.collect()
    return sides, failures
