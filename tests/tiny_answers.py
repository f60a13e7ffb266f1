# SPDX-License-Identifier: Apache-2.0
"""A tiny target's own answers as a data set, and short runs on them."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM

from tests.tiny_targets import VOCAB_SIZE
from vllm_mtp.data.settings import (
    EngineSettings,
    PromptCounts,
    RunFile,
    RunSettings,
    SamplingSettings,
    SourceSettings,
)
from vllm_mtp.data.store import Row, Store
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.training.arguments import DrafterTrainingArguments

PROMPT_TOKENS, ANSWER_TOKENS = 4, 20
MakeArguments = Callable[..., DrafterTrainingArguments]


@pytest.fixture(scope="session")
def tiny_answers(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of 24 greedy answers, a quarter of them held out."""
    folder = tmp_path_factory.mktemp("answers") / "data"
    return keep_answers(folder, tiny_llama, _answer(tiny_llama))


def write_answers(
    folder: Path,
    target: Path,
    texts: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
) -> Path:
    """Keep texts as a target's answers to their prompts, about a third held out."""
    rows = [
        Row(
            prompt_id=f"{number * 2654435761 % 2**32:08x}" + 24 * "0",
            category="",
            input_ids=list(text),
            loss_spans=[[length, len(text)]],
            finish_reason="length",
        )
        for number, (text, length) in enumerate(zip(texts, prompt_lengths, strict=True))
    ]
    return keep_answers(folder, target, rows, 0.34)


def keep_answers(
    folder: Path,
    target: Path,
    rows: Sequence[Row],
    held_out: float = 0.25,
    *,
    prompts: str = "made.jsonl",
    skip: int = 0,
    limit: int | None = None,
    **settings: Any,
) -> Path:
    """Keep rows as ``vllm-mtp generate`` does.

    Args:
        folder: Where to.
        target: Whose answers they are.
        rows: Of both splits.
        held_out: The part of them that is held out, by their hashes.
        prompts: The source.
        skip: Likewise.
        limit: Likewise.
        settings: Other values of `RunSettings`.
    """
    made: dict[str, Any] = {
        "target": TargetFacts.from_folder(target),
        "source": SourceSettings(prompts=prompts, skip=skip, limit=limit),
        "sampling": SamplingSettings(max_tokens=ANSWER_TOKENS),
        "engine": EngineSettings(max_model_len=64),
        "chat_template": False,
        "max_prompt_tokens": 32,
        "held_out": held_out,
        "vllm": "none",
    }
    run = RunFile(settings=RunSettings(**made | settings), prompts_sha256="")
    store = Store(folder)
    store.start(run)
    store.write_part(rows)
    store.finish(
        [row["prompt_id"] for row in rows],
        run,
        PromptCounts(read=len(rows), duplicates_dropped=0, too_long_dropped=0),
        {},
    )
    return folder


def _answer(target: Path) -> list[Row]:
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    prompts = torch.arange(24 * PROMPT_TOKENS).view(24, -1) * 37 % VOCAB_SIZE
    texts = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return [
        Row(
            prompt_id=f"{number * 2654435761 % 2**32:08x}" + 24 * "0",
            category="even" if number % 2 == 0 else "odd",
            input_ids=text,
            loss_spans=[[PROMPT_TOKENS, len(text)]],
            finish_reason="length",
        )
        for number, text in enumerate(texts.tolist())
    ]


@contextmanager
def training_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Keep what a run says, also where vLLM has quietened the log of this process."""
    logger = logging.getLogger("vllm.mtp_placeholder.training")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(logging.NOTSET)


@pytest.fixture
def arguments(tiny_llama: Path, tiny_answers: Path, tmp_path: Path) -> MakeArguments:
    """Makes the arguments of a run of a few steps on a CPU."""

    def _arguments(**settings: object) -> DrafterTrainingArguments:
        defaults: dict[str, object] = {
            "target": str(tiny_llama),
            "data": str(tiny_answers),
            "output_dir": str(tmp_path / "out"),
            "layers": "shared:all",
            "num_speculative_tokens": 3,
            "dtype": "float32",
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "anchors_per_text": 8,
        }
        return DrafterTrainingArguments(**defaults | settings)  # type: ignore[arg-type]

    return _arguments
