# SPDX-License-Identifier: Apache-2.0
"""Two processes on a CPU, as `torchrun` starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainingArguments

from tests.tiny_answers import MakeArguments
from vllm_mtp.training import same
from vllm_mtp.training.run import train
from vllm_mtp.training.states import TrainingInputError
from vllm_mtp.training.trainer import DrafterTrainer

BASE: dict[str, Any] = {
    "num_speculative_tokens": 3,
    "dtype": "float32",
    "learning_rate": 1e-2,
    "eval_texts": 1,  # so one of two processes has none
    "logging_steps": 1,
    "anchors_per_text": 6,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
    "max_steps": 3,
    "per_device_train_batch_size": 1,
}
LONG: dict[str, Any] = {
    "layers": "own:0,3",
    "max_steps": 60,
    "save_strategy": "steps",
    "save_steps": 20,
    "own_optimizer": "muon",
    "ema_decay": 0.9,
}
RUNS: dict[str, dict[str, Any]] = {
    # Every mean that a loss has, and every place that weights come from.
    "stages": {
        "stages": ["shared:0,own:2,3"],
        "stage_steps": 2,
        "layers": "own:1,3",
        "ce_weight": 0.5,
        "kl_weight": 0.5,
        "ce_start_steps": 1,
        "curriculum_steps": 1,
        "tv_weight": 1.0,
        "feature_weight": 0.5,
        "on_policy_weight": 0.5,
        "unvisited_weight": 0.5,
        "position_decay": 2.0,
        "loss_vocab_size": 64,
        "markov_rank": 4,
        "boundary_hidden": "first",
        "bridges": True,
        # Others would make much of rounding: they divide by the gradients' size.
        "optim": "sgd",
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
    "vocabulary": {
        "layers": "shared:0-2,own:3",
        "lora_rank": 4,
        "lora_modules": ["q_proj", "down_proj"],
        "draft_vocab_size": 128,
        "acceptance_weight": 0.5,
        "own_optimizer": "muon",
        "max_steps": 2,
    },
    "unbroken": LONG,
    "killed": LONG,
}
LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def launch(*command: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*LAUNCHER, "--nproc_per_node", "2", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background job ignores it, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


class Runs(NamedTuple):
    """Runs of two processes, the last of which was killed."""

    folder: Path
    said: str  # by all of them, and by the launcher
    code: int

    def output(self, name: str) -> Path:
        return self.folder / name

    def write(self, name: str, settings: dict[str, Any], folder: str = "") -> Path:
        """A settings file; the drafter's folder is named like it, if not otherwise."""
        path = self.folder / f"{name}.yaml"
        output = {"output_dir": str(self.output(folder or name))}
        path.write_text(yaml.safe_dump(BASE | settings | output))
        return path


@pytest.fixture(scope="module")
def two(
    tiny_llama: Path, tiny_answers: Path, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("processes"), "", 0)
    BASE.update(target=str(tiny_llama), data=str(tiny_answers))
    files = [str(runs.write(name, settings)) for name, settings in RUNS.items()]
    process = launch("-m", "tests.training.two_processes", *files)
    said, _ = process.communicate(timeout=300)
    return runs._replace(said=said, code=process.returncode)


def lines_of_ours(said: str) -> list[str]:
    """Before the launcher's own report."""
    ours = said.partition("elastic/multiprocessing/api.py")[0]
    assert "Traceback" not in ours, said
    return [line for line in ours.splitlines() if line.startswith("vllm-mtp train:")]


def history(folder: Path) -> list[dict[str, float]]:
    state = json.loads((folder / "trainer_state.json").read_text("utf-8"))
    return [
        {name: value for name, value in line.items() if "_second" not in name}
        for line in state["log_history"]
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["stages", "vocabulary"])
def test_two_processes_train_and_measure_as_one(
    name: str, two: Runs, arguments: MakeArguments, tiny_llama: Path, tmp_path: Path
) -> None:
    """What these accumulate is one batch there. Answers end within blocks, so that the
    parts of a step have unlike many labels."""
    settings = BASE | RUNS[name] | {"report_to": []}
    batch = 2 * settings.get("gradient_accumulation_steps", 1)
    more = {
        "output_dir": str(tmp_path / name),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
    }
    args = arguments(**settings | more)
    train(args, tiny_llama)
    for folder in [two.output(name), *two.output(name).glob("stage-*")]:
        alone = tmp_path / folder.relative_to(two.folder)
        found, expected = weights(folder), weights(alone)
        assert found.keys() == expected.keys(), two.said
        for key, weight in expected.items():
            if name == "stages":
                torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=1e-5)
            difference = (found[key] - weight).double().norm()
            assert difference <= 5e-3 * weight.double().norm(), key
        lines = list(zip(history(folder), history(alone), strict=True))
        for line, wanted in lines:
            assert line.keys() == wanted.keys()
            rounded = {"grad_norm", "visited"}
            losses = {n for n in wanted if "loss" in n or n in rounded}
            for key in wanted.keys() - {"eval_runtime", "train_runtime", "epoch"}:
                exact = key not in losses
                assert line[key] == pytest.approx(wanted[key], rel=0 if exact else 1e-3)
        assert sum("eval_teacher_forced_length" in line for line, _ in lines) >= 1


def test_only_the_first_process_speaks_and_writes(two: Runs) -> None:
    said = two.said.splitlines()
    assert sum(line.startswith("drafter written") for line in said) == len(RUNS) - 1
    names = {path.name for path in two.output("unbroken").glob("checkpoint-60/*")}
    # The state of random generators is each process's own.
    assert names >= {"model.safetensors", "rng_state_0.pth", "rng_state_1.pth"}
    files = {path.name for path in two.output("unbroken").iterdir() if path.is_file()}
    drafter = {"config.json", "model.safetensors", "probe.safetensors", "README.md"}
    records = {"evaluation.json", "provenance.json", "trainer_state.json"}
    assert files == drafter | records


def test_a_run_goes_on_whatever_ended_it(two: Runs) -> None:
    """One process was killed, the run that goes on is interrupted, the next ends."""
    output, resume = two.output("killed"), LONG | {"resume_from_checkpoint": "last"}
    assert two.code == 1
    assert not (output / "model.safetensors").exists()
    lines = lines_of_ours(two.said)
    assert len(lines) <= 1  # none where the launcher was quicker
    assert all("another process of the run has ended" in line for line in lines)

    settings = str(two.write("resumed", resume, "killed"))
    process = launch("-m", "vllm_mtp.cli.main", "train", settings)
    wait_for(process, output / "checkpoint-40" / "trainer_state.json")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 1  # the launcher's
    assert not (output / "model.safetensors").exists()
    assert said.count("interrupted: ends after the running step") == 1
    expected = (
        "vllm-mtp train: interrupted; with --resume-from-checkpoint last it goes on "
        f"from the last checkpoint in {output}"
    )
    # The launcher tells at once that it was interrupted, and then waits.
    lines = [line for line in said.splitlines() if line.startswith("vllm-mtp")]
    assert lines == [expected]

    broken = str(two.write("broken", {"layers": "own:3"}))
    process = launch("-m", "tests.training.two_processes", settings, broken)
    said, _ = process.communicate(timeout=240)
    found, unbroken = weights(output), weights(two.output("unbroken"))
    assert found.keys() == unbroken.keys()
    for key, weight in unbroken.items():
        assert found[key].equal(weight), key
    # And the error of one process is one line.
    assert process.returncode == 1
    (line,) = lines_of_ours(said)
    assert "step 0: the loss is not finite" in line


def wait_for(process: "subprocess.Popen[str]", file: Path) -> None:
    deadline = time.monotonic() + 240
    while not file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{file} was not written: {process.communicate()[0]}")
        time.sleep(0.01)


def test_processes_that_see_other_folders_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = ["goes on from out/checkpoint-10", "goes on from None"]
    monkeypatch.setattr(same, "gather_object", lambda _: found)
    with pytest.raises(TrainingInputError, match="process 1 .*all machines") as caught:
        same.require_same_everywhere("output_dir", "goes on from None")
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    same.require_same_everywhere("output_dir", "of one process")


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_each_held_out_text_is_in_one_process(processes: int) -> None:
    texts = [{"index": number} for number in range(3)]
    seen: list[int] = []
    for number in range(processes):
        trainer = DrafterTrainer.__new__(DrafterTrainer)
        trainer.eval_dataset = texts  # type: ignore[assignment]
        trainer.args = evaluated_by(number, processes)
        for batch in trainer.get_eval_dataloader():
            seen += [text["index"] for text in batch["texts"]]
    assert sorted(seen) == [0, 1, 2]


def evaluated_by(process: int, processes: int, **given: Any) -> Any:
    """Of all arguments those that an evaluation's loader asks for."""
    defaults = TrainingArguments(output_dir="x", use_cpu=True, report_to="none")
    loader = {
        name: getattr(defaults, name)
        for name in vars(defaults)
        if name.startswith("dataloader_")
    }
    ours = {
        "process_index": process,
        "world_size": processes,
        "per_device_eval_batch_size": 2,
        "dataloader_pin_memory": False,
    }
    return SimpleNamespace(**loader | ours | given)


def test_evaluations_load_as_the_flags_say() -> None:
    trainer = DrafterTrainer.__new__(DrafterTrainer)
    trainer.eval_dataset = [{"index": 0}]  # type: ignore[assignment]
    given = {
        "num_workers": 1,
        "prefetch_factor": 3,
        "pin_memory": True,
        "multiprocessing_context": "spawn",
        "in_order": False,
    }
    flags = {f"dataloader_{name}": value for name, value in given.items()}
    trainer.args = evaluated_by(0, 1, **flags)
    loader = trainer.get_eval_dataloader()
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    del given["multiprocessing_context"]
    assert {name: getattr(loader, name) for name in given} == given
