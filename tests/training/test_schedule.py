# SPDX-License-Identifier: Apache-2.0
"""What is taught when: a start of cross-entropy, and a curriculum of positions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec.goldens import fill_weights
from tests.tiny_answers import MakeArguments
from tests.tiny_targets import VOCAB_SIZE
from vllm_mtp.errors import MTPError
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.training.loss_module import LossModule, LossPlan
from vllm_mtp.training.objective import Objective
from vllm_mtp.training.schedule import Schedule

TEXT: dict[str, Any] = {
    "index": 0,
    "input_ids": torch.arange(30) * 37 % VOCAB_SIZE,
    "loss_spans": [[4, 30]],
}
STATED = Objective(ce=0.1, tv=0.9, position_decay=4.0)


def test_the_losses_are_the_stated_ones_after_the_start() -> None:
    schedule = Schedule(ce_start_steps=3)
    start = Objective(ce=1.0, position_decay=4.0)
    found = [schedule.objective(STATED, step) for step in range(5)]
    assert found == [start] * 3 + [STATED] * 2
    assert Schedule().objective(STATED, 0) is STATED


def test_positions_grow_from_two_to_all() -> None:
    schedule = Schedule(curriculum_steps=2)
    found = [schedule.positions(4, step) for step in range(8)]
    assert found == [2, 2, 3, 3, 4, 4, 4, 4]
    assert [Schedule().positions(4, step) for step in (0, 9)] == [4, 4]


@pytest.mark.parametrize("layers", ["shared:all", "own:2"])
def test_a_step_is_that_of_a_plan_without_a_schedule(
    layers: str, tiny_llama: Path
) -> None:
    """Blocks stand where they would stand, and the last step's loss is the stated."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    host = HFTarget(model.eval().requires_grad_(False))
    options = DrafterOptions(dtype="float32", lora_rank=2, markov_rank=4)
    drafter = new_drafter(tiny_llama, layers, 4, options)
    fill_weights(drafter, 0.1, salt="schedule ")

    def losses(step: int, **plan: Any) -> dict[str, torch.Tensor]:
        return LossModule(drafter, host, LossPlan(**plan))([TEXT], step=step)

    both = Schedule(ce_start_steps=3, curriculum_steps=2)
    ce = Objective(ce=1.0, position_decay=4.0)
    for step, (objective, positions) in enumerate(
        [(ce, 2), (ce, 2), (ce, 3), (STATED, 3), (STATED, None)]
    ):
        found = losses(step, objective=STATED, schedule=both)
        wanted = losses(step, objective=objective, num_draft_tokens=positions)
        assert found.keys() == wanted.keys()
        torch.testing.assert_close(found, wanted)
        plan = LossPlan(objective=STATED, schedule=both)
        module = LossModule(drafter, host, plan)
        # A step in parts knows the counts of the whole.
        whole = module.labels_of_step([TEXT], step, lambda counts: counts)
        torch.testing.assert_close(module([TEXT], step=step, whole=whole), found)
    blocks = [module.blocks(TEXT, 4)]
    torch.testing.assert_close(module.loss_of(blocks), module.loss_of(blocks, step=4))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"ce_start_steps": 5}, "cross-entropy alone all the time"),
        ({"ce_start_steps": -1, "tv_weight": 1.0}, "ce_start_steps: got -1"),
        ({"curriculum_steps": -1}, "curriculum_steps: got -1"),
        ({"curriculum_steps": 5, "train_places": 2}, "only 2 positions are taught"),
        (
            {"curriculum_steps": 5, "num_speculative_tokens": 2},
            "only 2 positions are taught",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(
    arguments: MakeArguments, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(MTPError, match=reason):
        arguments(**settings)
