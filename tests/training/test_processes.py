# SPDX-License-Identifier: Apache-2.0
"""Two processes on a CPU, as `torchrun` starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from tests.tiny_answers import MakeArguments
from vllm_mtp.training.run import train
from vllm_mtp.training.trainer import DrafterTrainer

SETTINGS: dict[str, Any] = {
    "layers": "own:3",
    "num_speculative_tokens": 3,
    "dtype": "float32",
    "max_steps": 2,
    "learning_rate": 1e-2,
    "kl_weight": 0.5,
    "eval_texts": 1,  # so one of two processes has none
    "eval_strategy": "steps",
    "eval_steps": 1,
    "logging_steps": 1,
    "anchors_per_text": 8,
    "use_cpu": True,
    "disable_tqdm": True,
}


def history(folder: Path) -> list[dict[str, float]]:
    state = json.loads((folder / "trainer_state.json").read_text("utf-8"))
    return [
        {name: value for name, value in line.items() if "_second" not in name}
        for line in state["log_history"]
    ]


def test_two_processes_train_and_measure_as_one(
    arguments: MakeArguments, tiny_llama: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    args = arguments(
        **SETTINGS, output_dir=str(one), per_device_train_batch_size=2, seed=3
    )
    train(args, tiny_llama)
    settings = tmp_path / "run.yaml"
    more = {
        "target": str(tiny_llama),
        "data": str(tiny_answers),
        "output_dir": str(two),
        "per_device_train_batch_size": 1,
        "seed": 3,
        "report_to": "none",
    }
    settings.write_text(yaml.safe_dump(SETTINGS | more))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "vllm_mtp.cli.main", "train", str(settings)]
    done = subprocess.run(
        [sys.executable, *launcher, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    found, expected = history(two), history(one)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        same = {name for name in wanted if "runtime" not in name}
        assert {n: line[n] for n in same} == pytest.approx(
            {n: wanted[n] for n in same}, rel=1e-3
        )
    assert sum("loss_kl" in line for line in found) == 2
    assert sum("eval_teacher_forced_length" in line for line in found) == 3
    assert (two / "model.safetensors").is_file()


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
