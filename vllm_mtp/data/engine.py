# SPDX-License-Identifier: Apache-2.0
"""vLLM's offline engine, for ``vllm-mtp generate``: the target alone, no drafter."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_mtp.data.generation import Answer
from vllm_mtp.data.render import Request
from vllm_mtp.data.settings import EngineSettings, SamplingSettings
from vllm_mtp.data.split import prompt_seed
from vllm_mtp.interrupts import stop_if_asked


def _set_environment() -> None:
    """Set what the user did not; before vLLM is imported, which reads some of it."""
    # Without a second process no core is spent on waiting.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


class Engine:
    """One engine in this process, gone when the ``with`` block ends.

    Args:
        target: The target's folder.
        settings: Of the engine.
        sampling: How it answers.
    """

    def __init__(
        self, target: Path, settings: EngineSettings, sampling: SamplingSettings
    ) -> None:
        _set_environment()
        from vllm import LLM
        from vllm.platforms import current_platform

        # vLLM's types are wider than what token ids in and out can be.
        dtype: Any = settings.dtype
        self._llm: Any = LLM(
            str(target),
            dtype=dtype,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            # Compiling takes longer there than it wins; GPUs have CUDA graphs.
            enforce_eager=current_platform.is_cpu(),
            use_tqdm_on_load=False,
            disable_log_stats=True,
        )
        self._sampling = sampling

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def answer(
        self, requests: Sequence[Request], on_answer: Callable[[int], None]
    ) -> list[Answer]:
        """See `data.generation.Answerer`."""
        # What an earlier chunk left there would change how prompts are batched, and
        # after a kill it is not there.
        self._llm.reset_prefix_cache()
        answers: dict[str, Answer] = {}
        for index, request in enumerate(requests):
            stop_if_asked()
            self._llm.llm_engine.add_request(
                str(index),
                {"prompt_token_ids": request.token_ids},
                sampling_params(self._sampling, request.prompt_id),
            )
        while self._llm.llm_engine.has_unfinished_requests():
            stop_if_asked()
            for output in self._llm.llm_engine.step():
                found = output.outputs[0]
                ids = list(found.token_ids)
                answers[output.request_id] = Answer(ids, found.finish_reason)
                on_answer(len(ids))
        return [answers[str(index)] for index in range(len(requests))]


def sampling_params(sampling: SamplingSettings, identifier: str) -> Any:
    """vLLM's settings for one prompt, with a seed of its own."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    greedy = sampling.temperature == 0
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=1.0 if greedy else sampling.top_p,
        top_k=0 if greedy else sampling.top_k,
        # A seed costs time, so greedy answers get none.
        seed=None if greedy else prompt_seed(sampling.seed, identifier),
        max_tokens=sampling.max_tokens,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def vllm_version() -> str:
    _set_environment()
    import vllm

    return vllm.__version__
