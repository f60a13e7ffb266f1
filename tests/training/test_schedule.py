# SPDX-License-Identifier: Apache-2.0
"""What is taught when: a start of cross-entropy, and a curriculum of positions."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec.goldens import fill_weights
from tests.tiny_answers import MakeArguments, training_log
from tests.tiny_targets import VOCAB_SIZE
from vllm_mtp.errors import MTPError
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.training.loss_module import LossModule, LossPlan
from vllm_mtp.training.objective import Objective
from vllm_mtp.training.run import train
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


LATE: dict[str, Any] = {"curriculum_steps": 4, "num_speculative_tokens": 3}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        # The fifth step is the first one of three positions.
        (LATE | {"max_steps": 4}, ["a run of 4 steps never teaches all 3 positions"]),
        (LATE | {"max_steps": 5}, []),
        # 18 texts, two at a time.
        (LATE | {"max_steps": -1, "num_train_epochs": 0.4}, ["a run of 4 steps"]),
        (
            LATE | {"max_steps": 5, "stages": ["own:0,3"], "stage_steps": 1},
            ["a run of 1 steps"],
        ),
        (
            {"ce_start_steps": 2, "tv_weight": 1.0, "max_steps": 2},
            ["ce_start_steps: got 2, .* never comes to the loss"],
        ),
    ],
)
def test_a_run_that_ends_too_early_says_so(
    settings: dict[str, Any],
    said: list[str],
    arguments: MakeArguments,
    tiny_llama: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    args = arguments(layers="own:3", eval_texts=1, **settings)
    with training_log(caplog):
        train(args, tiny_llama)
    # Once each, though a logger that propagates shows them twice.
    lines = list(dict.fromkeys(m for m in caplog.messages if "_steps: got" in m))
    assert len(lines) == len(said)
    for line, expected in zip(lines, said, strict=True):
        assert re.search(expected, line)


def test_a_part_of_the_loss_is_a_mean_over_the_steps_that_have_it(
    arguments: MakeArguments, tiny_llama: Path
) -> None:
    """Also in a line of the log over steps with it and without."""

    def logged(logging_steps: int) -> list[dict[str, float]]:
        args = arguments(
            layers="own:3",
            ce_start_steps=3,
            ce_weight=0.5,
            tv_weight=0.5,
            max_steps=4,
            gradient_accumulation_steps=2,
            eval_texts=1,
            logging_steps=logging_steps,
        )
        train(args, tiny_llama)
        file = Path(str(args.output_dir), "trainer_state.json")
        history = json.loads(file.read_text("utf-8"))["log_history"]
        return [line for line in history if "loss" in line]

    each, (whole,) = logged(1), logged(4)
    assert ["loss_tv" in line for line in each] == [False] * 3 + [True]
    assert whole["loss_tv"] == pytest.approx(each[3]["loss_tv"])
    mean = sum(line["loss_ce"] for line in each) / 4
    assert whole["loss_ce"] == pytest.approx(mean)
