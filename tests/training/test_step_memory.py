# SPDX-License-Identifier: Apache-2.0
"""The formula of `plan` beside the real step, at the sizes of Qwen3-8B."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.tiny_answers import MakeArguments
from tests.tiny_targets import make_tiny
from tests.training.step_traces import FILE, NEW, SEEN, SETTINGS, TARGET, settings_of
from tests.training.test_fake_step import SIZES
from vllm_mtp.cli.plan import bare_target
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.torch_host.without_weights import BareTarget
from vllm_mtp.training.fake_step import fake_step
from vllm_mtp.training.step_memory import (
    AVERAGE,
    BUCKETS,
    DRAFTER,
    GRADIENTS,
    KEPT,
    OPTIMIZER,
    step_memory,
)
from vllm_mtp.training.step_memory import TARGET as TARGETS_WEIGHTS
from vllm_mtp.training.step_shape import step_shape
from vllm_mtp.training.step_time import learn_flops

CHEAPEST = "two own layers"


def traces() -> dict[str, dict[str, int]]:
    return json.loads(FILE.read_text("utf-8"))


def test_every_setting_was_traced() -> None:
    assert list(traces()) == list(SETTINGS)
    assert not set(SEEN) & set(NEW)
    assert len(NEW) >= 6
    new = [settings_of(name) for name in NEW]
    assert {args.anchors_per_text for args in new} >= {64, 128, 256, 512}
    assert {args.max_text_tokens for args in new} >= {1024, 2048, 4096}
    assert {args.per_device_train_batch_size for args in new} >= {1, 2, 4, 8}
    assert {bool(args.markov_rank) for args in new} == {True, False}
    assert {bool(args.lora_rank) for args in new} == {True, False}
    assert {(args.tv_weight, args.teacher_tokens) for args in new} >= {(0.9, 0)}


@pytest.fixture(scope="module")
def target() -> BareTarget:
    return bare_target(str(TARGET))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_formula_is_the_real_steps_peak(name: str, target: BareTarget) -> None:
    real = traces()[name]
    found = step_memory(step_shape(target, settings_of(name)))
    # These are counted, so there is nothing to be near to.
    for kept in (TARGETS_WEIGHTS, DRAFTER, OPTIMIZER):
        assert found[kept] == real[kept]
    assert sum(found.values()) == pytest.approx(sum(real.values()), rel=0.03)
    assert moving(found) == pytest.approx(moving(real), rel=0.15)


def moving(memory: Mapping[str, int]) -> int:
    """All but what is there in every step."""
    kept = (TARGETS_WEIGHTS, DRAFTER, OPTIMIZER)
    return sum(size for name, size in memory.items() if name not in kept)


def test_the_traces_are_those_of_todays_code(target: BareTarget) -> None:
    trace = fake_step(target, settings_of(CHEAPEST))
    assert trace.total == pytest.approx(sum(traces()[CHEAPEST].values()), rel=0.01), (
        "the step keeps something else now: mend step_memory.py, then run "
        "python -m tests.training.step_traces"
    )


def test_four_texts_fit_into_80_gb(target: BareTarget) -> None:
    free = 78 * 2**30
    assert sum(traces()["own, four texts"].values()) < free
    args = settings_of("own, four texts")
    assert (args.max_text_tokens, args.anchors_per_text) == (4096, 512)
    shape = step_shape(target, args)
    assert sum(step_memory(shape).values()) < free


LORA: dict[str, Any] = {
    "layers": "shared:all",
    "lora_rank": 2,
    "lora_modules": ["q_proj", "o_proj"],
    "max_text_tokens": 64,
    "states_budget_gb": 0,
    "bf16": True,
}


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "phi3"])
def test_other_families_are_counted_too(
    family: str, arguments: MakeArguments, tmp_path: Path
) -> None:
    args, target = arguments(**LORA), bare_target(str(make_tiny(family, tmp_path)))
    found = step_memory(step_shape(target, args))
    assert sum(found.values()) == pytest.approx(fake_step(target, args).total, rel=0.15)


@pytest.mark.parametrize("family", ["gemma4", "qwen2_5_vl", "phi3_longrope"])
def test_what_cannot_be_traced_can_be_planned(
    family: str, arguments: MakeArguments, tmp_path: Path
) -> None:
    args, target = arguments(**LORA), bare_target(str(make_tiny(family, tmp_path)))
    assert sum(step_memory(step_shape(target, args)).values()) > 0
    with pytest.raises(UnsupportedTargetError, match="leave --trace out"):
        fake_step(target, args)


def test_weights_that_are_not_trained_leave_the_gradients_of_others(
    target: BareTarget,
) -> None:
    """A frozen placeholder is no reason to count a step as one without gradients."""
    # Its peak is in the backward of the first layer, when LoRA's gradients are there.
    noise = replace(
        settings_of("LoRA on noise tokens"),
        gradient_checkpointing=True,
        loss_vocab_size=1024,
        teacher_tokens=64,
        anchors_per_text=64,
    )
    frozen, trained = (
        step_shape(target, replace(noise, placeholder_kind=kind))
        for kind in ("noise", "trained")
    )
    assert frozen.trained_parameters < frozen.drafter_parameters
    assert trained.trained_parameters == trained.drafter_parameters
    found = step_memory(frozen)[GRADIENTS]
    assert found == step_memory(trained)[GRADIENTS] > 0


def test_states_that_are_kept_count(target: BareTarget) -> None:
    args = replace(settings_of(CHEAPEST), states_budget_gb=1.5)
    assert step_memory(step_shape(target, args))[KEPT] == 1.5 * 2**30


def test_a_walk_takes_time_and_an_average_memory(target: BareTarget) -> None:
    plain = step_shape(target, settings_of(CHEAPEST))
    args = replace(plain.args, unvisited_weight=0.3, ema_decay=0.9)
    shape = replace(plain, args=args)
    before, now = step_memory(plain), step_memory(shape)
    assert now.pop(AVERAGE) == before[DRAFTER]
    assert before == now  # the choice of the drafts takes less than the loss
    rows = plain.blocks * plain.positions
    head = plain.config.target.hidden_size * plain.config.target.vocab_size
    assert learn_flops(shape) - learn_flops(plain) == 2 * rows * head


def test_all_that_can_be_drafted_is_chosen_from(arguments: MakeArguments) -> None:
    """Also where the loss looks at a few tokens only."""
    target = BareTarget(LlamaConfig(**SIZES | {"vocab_size": 20_000}))
    found = []
    for weight in (1.0, 0.3):
        args = arguments(
            **{"layers": "own:0", "markov_rank": 4, "loss_vocab_size": 8},
            **{"unvisited_weight": weight, "anchors_per_text": 80, "bf16": True},
            **{"max_text_tokens": 100, "states_budget_gb": 0},
        )
        memory = step_memory(step_shape(target, args))
        traced = fake_step(target, args)
        assert moving(memory) == pytest.approx(moving(traced.peak), rel=0.15)
        found.append(moving(memory))
    assert found[1] > 2 * found[0]


def test_several_devices_keep_gradients_once_more(target: BareTarget) -> None:
    shape = step_shape(target, settings_of(CHEAPEST))
    one, two = step_memory(shape), step_memory(shape, num_devices=2)
    assert two.pop(BUCKETS) == 4 * shape.trained_parameters
    assert one == two
