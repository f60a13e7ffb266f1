# SPDX-License-Identifier: Apache-2.0
"""Serving a drafter that was trained beside its target."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serving.engines import engine, generate
from tests.serving.test_replacing import LENGTH, PROMPTS, replace
from tests.training.co_trained import SETTINGS, model_of, plain_trainer
from vllm_mtp import co_train

pytestmark = pytest.mark.engine


def test_it_is_found_in_the_checkpoint_and_takes_the_old_ones_place(
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    old = tiny_drafter("llama", "mixed")
    trainer = plain_trainer(model_of(tiny_targets["llama"]), tmp_path / "out")
    co_train(trainer, old, **SETTINGS)
    trainer.train()
    target = tmp_path / "out" / "checkpoint-4"
    with engine(target, {"method": "mtp_placeholder"}) as llm:
        found = generate(llm, PROMPTS, LENGTH)
        replace(llm, old)
        before = generate(llm, PROMPTS, LENGTH)
        replace(llm, target / "mtp_placeholder")
        after = generate(llm, PROMPTS, LENGTH)
    assert found.token_ids == before.token_ids == after.token_ids
    assert found.counts == after.counts != before.counts
