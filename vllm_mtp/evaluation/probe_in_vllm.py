# SPDX-License-Identifier: Apache-2.0
"""Draft the blocks of a probe in vLLM, and keep what its drafter computes."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_mtp.drafter.checkpoint import read_config
from vllm_mtp.drafter.model import BoundDrafter
from vllm_mtp.errors import MTPError
from vllm_mtp.evaluation.blocks import Block, Outcome, ProbeTexts, recording
from vllm_mtp.evaluation.model_len import model_len_as_served
from vllm_mtp.plugin import METHOD


def run_in_vllm(
    folder: Path | str, target: Path | str, texts: ProbeTexts, dtype: str
) -> Outcome:
    """Draft all blocks in an engine of this process, in one batch.

    Args:
        folder: The drafter's.
        target: The target's.
        texts: The blocks.
        dtype: Of the target.

    Raises:
        MTPError: The drafter does not fit, or vLLM did not draft some block.
    """
    blocks, config = texts.blocks(), read_config(folder)
    with (
        _engine(folder, target, blocks, config.num_speculative_tokens, dtype) as llm,
        recording(_bound_drafter_of(llm)) as recorder,
    ):
        _draft(llm, blocks)
    return recorder.outcome(blocks, config)


@contextmanager
def _engine(
    folder: Path | str,
    target: Path | str,
    blocks: Sequence[Block],
    num_draft_tokens: int,
    dtype: str,
) -> Iterator[Any]:
    # Only what the user did not set, and before vLLM is imported. In another
    # process the drafter would be out of reach.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    longest = max(len(block.prefix) for block in blocks) + 1 + num_draft_tokens
    llm = LLM(
        str(target),
        dtype=dtype,  # type: ignore[arg-type]
        enforce_eager=True,
        max_model_len=model_len_as_served(target, longest),
        max_num_seqs=len(blocks),
        # All prompts in one step and in one piece: a piece of a prompt would be
        # drafted behind, too, with the prompt's next token as the anchor.
        max_num_batched_tokens=max(longest, sum(len(b.prefix) + 1 for b in blocks)),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        speculative_config={"method": METHOD, "model": str(folder)},
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def _bound_drafter_of(llm: Any) -> BoundDrafter:
    """Our drafter inside an in-process engine, on either runner.

    It then also drafts behind a request's last token.
    """
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        raise MTPError(
            "check: VLLM_ENABLE_V1_MULTIPROCESSING is "
            f"{os.environ.get('VLLM_ENABLE_V1_MULTIPROCESSING')!r}, so the drafter "
            "runs in another process; expected 0. Unset it"
        )
    runner = core.model_executor.driver_worker.worker.model_runner
    if hasattr(runner, "speculator"):
        return runner.speculator._bound
    runner.drafter.skips_ended = False
    return runner.drafter._bound


def _draft(llm: Any, blocks: Sequence[Block]) -> None:
    """One request per block, made to sample the block's anchor first."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.0,
            # The drafter runs in the step that samples the anchor, so that no
            # request ever drafts behind other tokens.
            max_tokens=1,
            ignore_eos=True,
            detokenize=False,
            allowed_token_ids=[block.anchor],
        )
        for block in blocks
    ]
    prompts = [{"prompt_token_ids": list(block.prefix)} for block in blocks]
    llm.generate(prompts, params, use_tqdm=False)
