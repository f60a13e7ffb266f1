# SPDX-License-Identifier: Apache-2.0
"""The target alone, no drafter, answers requests for ``vllm-mtp generate``."""

import contextlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_mtp import engine
from vllm_mtp.data.generation import Answer
from vllm_mtp.data.render import Request
from vllm_mtp.data.served_sampling import PENALTIES
from vllm_mtp.data.settings import (
    EngineSettings,
    MachineSettings,
    SamplingSettings,
)
from vllm_mtp.data.split import prompt_seed
from vllm_mtp.errors import MTPError
from vllm_mtp.interrupts import stop_if_asked


@contextlib.contextmanager
def answering(
    target: Path,
    settings: EngineSettings,
    sampling: SamplingSettings,
    machine: MachineSettings,
) -> "Iterator[VLLMAnswerer]":
    """An engine of this process, gone when the ``with`` block ends.

    Args:
        target: The target's folder.
        settings: Of the engine.
        sampling: How it answers.
        machine: What the engine runs on.

    Raises:
        MTPError: vLLM does not start it.
    """
    # Those that are left out are vLLM's, which differ from platform to platform.
    given = {name: value for name, value in machine if value is not None}
    with contextlib.ExitStack() as stack:
        try:
            llm = stack.enter_context(
                engine.start(
                    target,
                    cache_gib=4,
                    dtype=settings.dtype,
                    tokenizer_mode=settings.tokenizer_mode,  # knows the end's token
                    generation_config=settings.generation_config,  # has more of them
                    max_model_len=settings.max_model_len,
                    max_num_seqs=settings.max_num_seqs,
                    quantization=settings.quantization,
                    disable_log_stats=True,
                    **given,
                )
            )
        except Exception as error:  # of any kind: memory, devices, kernels, weights
            raise MTPError(_not_started(target, settings, machine, error)) from error
        yield VLLMAnswerer(llm, sampling, settings.max_num_seqs)


def _not_started(
    target: Path, settings: EngineSettings, machine: MachineSettings, error: Exception
) -> str:
    flags = {"dtype": settings.dtype, "quantization": settings.quantization}
    flags |= {"max_num_seqs": settings.max_num_seqs} | dict(machine)
    told = " ".join(
        f"--{name.replace('_', '-')} {value}"
        for name, value in flags.items()
        if value is not None
    )
    said = " ".join(str(error).split())[:400] or "see above"
    return (
        f"--target {target}: vLLM starts no engine of it with {told} "
        f"({type(error).__name__}: {said})"
    )


class VLLMAnswerer:
    """Answers with vLLM; see `data.generation.Answerer`.

    Args:
        llm: Of this process.
        sampling: How it answers.
        at_once: Requests that the engine decodes at once.
    """

    def __init__(self, llm: Any, sampling: SamplingSettings, at_once: int) -> None:
        # vLLM's types are wider than what token ids in and out can be.
        self._engine, self._sampling = llm.llm_engine, sampling
        self._at_once = at_once

    def answers(
        self, requests: Iterable[Request], sampling: SamplingSettings | None = None
    ) -> Iterator[tuple[Request, Answer]]:
        """See `data.generation.Answerer`.

        Args:
            requests: Likewise.
            sampling: None: as it answers.
        """
        sampling = sampling or self._sampling
        numbered = enumerate(requests)
        running: dict[str, Request] = {}
        while True:
            # More would only wait inside the engine.
            for number, request in islice(numbered, self._at_once - len(running)):
                stop_if_asked()
                running[str(number)] = request
                self._engine.add_request(
                    str(number),
                    {"prompt_token_ids": request.token_ids},
                    sampling_params(sampling, request.prompt_id),
                )
            if not running:
                return
            stop_if_asked()
            for output in self._engine.step():
                found = output.outputs[0]
                answer = Answer(list(found.token_ids), found.finish_reason)
                yield running.pop(output.request_id), answer


def sampling_params(sampling: SamplingSettings, identifier: str) -> Any:
    """vLLM's settings for one prompt, with a seed of its own."""
    greedy = sampling.temperature == 0
    return engine.sampling(
        final_only=True,
        temperature=sampling.temperature,
        top_p=1.0 if greedy else sampling.top_p,
        top_k=0 if greedy else sampling.top_k,
        min_p=0.0 if greedy else sampling.min_p,
        # Greedy decoding takes the likeliest token after the penalties.
        **{name: getattr(sampling, name) for name in PENALTIES},
        # A seed costs time, so greedy answers get none.
        seed=None if greedy else prompt_seed(sampling.seed, identifier),
        max_tokens=sampling.max_tokens,
        detokenize=False,
    )
