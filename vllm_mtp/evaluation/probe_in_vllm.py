# SPDX-License-Identifier: Apache-2.0
"""Draft the blocks of a probe in vLLM, and keep what its drafter computes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_mtp import engine
from vllm_mtp.drafter.checkpoint import read_config
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
    longest = max(len(block.prefix) for block in blocks) + 1
    longest += config.num_speculative_tokens
    with engine.start(
        target,
        enforce_eager=True,
        dtype=dtype,
        max_model_len=model_len_as_served(target, longest),
        max_num_seqs=len(blocks),
        # All prompts in one step and in one piece: a piece of a prompt would be
        # drafted behind, too, with the prompt's next token as the anchor.
        max_num_batched_tokens=max(longest, sum(len(b.prefix) + 1 for b in blocks)),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        speculative_config={
            "method": METHOD,
            "model": str(folder),
            "num_speculative_tokens": config.num_speculative_tokens,
        },
    ) as llm:
        proposer = engine.drafter_of(llm)
        if hasattr(proposer, "skips_finished"):  # V1
            proposer.skips_finished = False  # every request here ends with its anchor
        with recording(engine.bound_drafter_of(llm)) as recorder:
            _draft(llm, blocks)
    return recorder.outcome(blocks, config)


def _draft(llm: Any, blocks: Sequence[Block]) -> None:
    """One request per block, made to sample the block's anchor first."""
    params = [
        engine.sampling(
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
