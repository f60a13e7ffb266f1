# SPDX-License-Identifier: Apache-2.0
"""The moving average of the weights, and a learning rate that falls in the end."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.tiny_answers import MakeArguments, training_log
from vllm_mtp.drafter.checkpoint import load_drafter
from vllm_mtp.errors import MTPError
from vllm_mtp.training.average import AVERAGE_FILE, WeightAverage
from vllm_mtp.training.run import train
from vllm_mtp.training.states import TrainingInputError
from vllm_mtp.training.trainer import DrafterTrainer

STEPS, DECAY = 5, 0.6
RUN: dict[str, Any] = {
    "layers": "own:3",
    "dtype": "bfloat16",
    "markov_rank": 4,
    "ema_decay": DECAY,
    "max_steps": STEPS,
    "learning_rate": 0.01,
    "placeholder_lr_scale": 1.0,
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": {"num_decay_steps": 2, "decay_type": "linear"},
    "warmup_steps": 1,
    "eval_texts": 2,
    "eval_strategy": "steps",
    "eval_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 9,
}


def test_a_run_writes_and_measures_the_average(
    arguments: MakeArguments, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[dict[str, torch.Tensor]] = []
    evaluate = DrafterTrainer.evaluate

    def seen(self: DrafterTrainer, *args: Any, **kwargs: Any) -> Any:
        state = self.loss_module.drafter.state_dict()
        measured.append({name: value.clone() for name, value in state.items()})
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(DrafterTrainer, "evaluate", seen)
    args = arguments(**RUN)
    train(args, tiny_llama)
    out = Path(str(args.output_dir))
    steps = [weights(out / f"checkpoint-{step}") for step in range(1, STEPS + 1)]
    average = {name: value.double() for name, value in steps[0].items()}
    for step in steps[1:]:
        for name, value in step.items():
            average[name] = DECAY * average[name] + (1 - DECAY) * value.double()
    last = steps[-1]
    assert (
        not average["layers.0.q_proj.weight"]
        .float()
        .equal(last["layers.0.q_proj.weight"])
    )
    on_the_way, in_the_end = measured
    written = load_drafter(out).state_dict()
    for name, value in written.items():
        assert on_the_way[name].equal(last[name]), name
        assert in_the_end[name].dtype == torch.float32
        torch.testing.assert_close(
            in_the_end[name].double(), average[name], rtol=1e-5, atol=1e-7
        )
        assert value.equal(in_the_end[name].bfloat16()), name

    # Constant, and then falling.
    history = json.loads((out / "trainer_state.json").read_text("utf-8"))["log_history"]
    rates = [line["learning_rate"] for line in history if "learning_rate" in line]
    assert rates == pytest.approx([0.0, 0.01, 0.01, 0.01, 0.005])

    # A run that goes on has the same average, bit for bit.
    resumed = out.with_name("resumed")
    shutil.copytree(out / "checkpoint-2", resumed / "checkpoint-2")
    more = {"output_dir": str(resumed), "resume_from_checkpoint": "last"}
    train(arguments(**RUN | more), tiny_llama)
    for name, value in load_drafter(resumed).state_dict().items():
        assert value.equal(written[name]), name
    ends = (load_file(f / f"checkpoint-{STEPS}" / AVERAGE_FILE) for f in (out, resumed))
    for ours, theirs in zip(*(sorted(end.items()) for end in ends), strict=True):
        assert ours[0] == theirs[0]
        assert ours[1].equal(theirs[1]), ours[0]

    file = resumed / f"checkpoint-{STEPS}" / AVERAGE_FILE
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(TrainingInputError, match="checkpoint-5: cannot be read"):
        train(arguments(**RUN | more), tiny_llama)
    file.unlink()
    with pytest.raises(TrainingInputError, match="ema_decay: the checkpoint has no av"):
        train(arguments(**RUN | more), tiny_llama)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = load_file(checkpoint / "model.safetensors")
    return {name.removeprefix("drafter."): value for name, value in found.items()}


def test_a_run_shorter_than_its_average_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    average = WeightAverage(nn.Linear(2, 2), 0.99)
    with training_log(caplog):
        average.on_train_begin(None, SimpleNamespace(max_steps=100), None)
        assert not caplog.messages
        average.on_train_begin(None, SimpleNamespace(max_steps=99), None)
    assert "averages over about 100 steps, but the run has 99" in caplog.messages[0]


def test_no_step_leaves_the_weights_as_they_are() -> None:
    layer = nn.Linear(2, 2)
    average = WeightAverage(layer, 0.9)
    with torch.no_grad():
        layer.weight.fill_(3.0)
    average.on_train_end(None, None, None)
    assert (layer.weight == 3).all()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"ema_decay": 1.0}, "ema_decay: got 1.0, expected a number above 0 and below"),
        ({"ema_decay": 0.0}, "ema_decay: got 0.0"),
        ({"ema_decay": float("nan")}, "ema_decay: got nan"),
        (
            {
                "ema_decay": 0.9,
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "save_strategy": "steps",
            },
            "ema_decay: got 0.9, but load_best_model_at_end is true",
        ),
        (
            {"ema_decay": 0.9, "optim": "schedule_free_adamw"},
            "ema_decay: got 0.9, but optim is schedule_free_adamw",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_type: got 'warmup_stable_decay', which has to know",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    settings: dict[str, Any], reason: str, arguments: MakeArguments
) -> None:
    with pytest.raises(MTPError, match=reason):
        arguments(**settings)


@pytest.mark.parametrize(("warmup", "falls"), [(0, 5), (1, 4), (0.3, 3)])
def test_a_rate_that_falls_before_the_run_begins_is_refused(
    warmup: float, falls: int, arguments: MakeArguments, tiny_llama: Path
) -> None:
    """It would begin somewhere on its way down."""
    args = arguments(
        layers="own:3",
        max_steps=4,
        warmup_steps=warmup,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": falls},
    )
    with pytest.raises(
        TrainingInputError, match=f"got num_decay_steps {falls}, behind"
    ):
        train(args, tiny_llama)
