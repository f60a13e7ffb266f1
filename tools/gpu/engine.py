# SPDX-License-Identifier: Apache-2.0
"""One side of a comparison as an engine in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sides import speculative_config

from vllm_mtp.engine import core_of, drafter_of, runner_of, start
from vllm_mtp.metrics import AcceptanceCounts


@dataclass
class Replays:
    """CUDA graphs of whole batches that were replayed."""

    target: int = 0
    drafter: int = 0

    def __add__(self, other: "Replays") -> "Replays":
        return Replays(self.target + other.target, self.drafter + other.drafter)


@dataclass
class Answers:
    """What one call gave."""

    outputs: list[Any]
    counts: AcceptanceCounts
    replays: Replays
    calls: int  # of the drafter


class Side:
    """A target with one way to draft for it, while `started` lasts.

    Args:
        name: As in `sides`.
        llm: The engine.
    """

    def __init__(self, name: str, llm: Any) -> None:
        self.name, self.llm = name, llm
        self.config = llm.llm_engine.vllm_config
        speculative = self.config.speculative_config
        self.num_tokens = speculative.num_speculative_tokens if speculative else 0
        self._drafts: list[tuple[int, int]] = []
        self._replays, self._calls = Replays(), 0
        self._record_drafts()

    @property
    def attention(self) -> str:
        """vLLM's attention backends, by the target's layers."""
        groups = [g for gs in runner_of(self.llm).attn_groups for g in gs]
        return ",".join(sorted({group.backend.get_name() for group in groups}))

    @property
    def kv_blocks(self) -> int:
        return self.config.cache_config.num_gpu_blocks or 0

    @property
    def capacity(self) -> int:
        """Tokens that the KV pool holds."""
        return self.kv_blocks * self.config.cache_config.block_size

    @property
    def has_draft_graphs(self) -> bool:
        """Whether our drafter has CUDA graphs of its own (vLLM's drafters are not
        asked)."""
        return getattr(drafter_of(self.llm), "_graphs", None) is not None

    @property
    def failed_drafts(self) -> int:
        """Drafts that failed; our drafter goes on without, and the text stays."""
        faults = getattr(drafter_of(self.llm), "faults", None)
        return faults.failures if faults else 0

    @contextmanager
    def without_draft_graphs(self) -> Iterator[None]:
        """Let our drafter draft as if it had never captured anything."""
        drafter = drafter_of(self.llm)
        graphs, drafter._graphs = drafter._graphs, None
        try:
            yield
        finally:
            drafter._graphs = graphs

    def answer(
        self, prompts: list[list[int]], max_tokens: int, logprobs: int | None = None
    ) -> Answers:
        """Greedy outputs of exactly ``max_tokens`` tokens."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=logprobs,
        )
        with self._counted():
            answers = self.llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False
            )
        outputs = [answer.outputs[0] for answer in answers]
        return Answers(outputs, counts_of(self._drafts), self._replays, self._calls)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the drafter's calls and the replays of graphs, anew."""
        from vllm.v1.worker.gpu.cudagraph_utils import (
            CudaGraphManager,
            ModelCudaGraphManager,
        )

        self._drafts.clear()
        self._replays, self._calls = Replays(), 0
        drafter = drafter_of(self.llm)
        replay, propose = CudaGraphManager.run_fullgraph, None

        def replaying(manager: Any, *args: Any) -> Any:
            if isinstance(manager, ModelCudaGraphManager):
                self._replays.target += 1
            else:
                self._replays.drafter += 1
            return replay(manager, *args)

        def proposing(*args: Any, **kwargs: Any) -> Any:
            self._calls += 1
            return propose(*args, **kwargs)

        CudaGraphManager.run_fullgraph = replaying
        if drafter is not None:
            propose, drafter.propose = drafter.propose, proposing
        try:
            yield
        finally:
            CudaGraphManager.run_fullgraph = replay
            if drafter is not None:
                drafter.propose = propose

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


@contextmanager
def started(
    name: str, target: Path, num_tokens: int, work: Path, **settings: Any
) -> Iterator[Side]:
    """A side, gone when the block ends.

    Args:
        name: As in `sides`.
        target: The target's folder.
        num_tokens: Tokens to draft per step.
        work: Folder for drafters that are made here.
        settings: Of vLLM's ``LLM``.
    """
    with start(
        target,
        speculative_config=speculative_config(name, target, num_tokens, work),
        seed=0,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        **settings,
    ) as llm:
        assert hasattr(runner_of(llm), "speculator"), "not the V2 runner"
        yield Side(name, llm)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def with_graphs(batches: tuple[int, ...], num_tokens: int) -> dict[str, Any]:
    """vLLM's settings for CUDA graphs of decoding steps, of just these sizes.

    Nothing is compiled: that takes longer than all else, and with another PyTorch than
    vLLM was made for it is the likeliest to fail.
    """
    rows = (1, num_tokens, num_tokens + 1)  # decoding, a draft, its verification
    sizes = sorted({batch * n for batch in batches for n in rows})
    return {
        "enforce_eager": False,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sizes,
        },
    }


def counts_of(drafts: list[tuple[int, int]]) -> AcceptanceCounts:
    """Counters of drafts, each given as its tokens and how many were accepted."""
    width = max((drafted for drafted, _ in drafts), default=0)
    positions = tuple(sum(n > i for _, n in drafts) for i in range(width))
    return AcceptanceCounts(len(drafts), sum(d for d, _ in drafts), positions)
