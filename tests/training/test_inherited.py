# SPDX-License-Identifier: Apache-2.0
"""Every flag of transformers' Trainer works, or is refused in one line."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from tests.tiny_answers import MakeArguments
from vllm_mtp.cli.main import main
from vllm_mtp.drafter.checkpoint import load_drafter
from vllm_mtp.errors import MTPError
from vllm_mtp.training.inherited import FILLED_IN, REFUSED, WORKS, _default
from vllm_mtp.training.run import train

FIELDS = {field.name: field for field in fields(TrainingArguments)}


def test_every_field_is_decided() -> None:
    """A new version of transformers has a new one? Put it into one of the tables."""
    undecided = set(FIELDS) - WORKS - set(REFUSED)
    assert not undecided
    assert not WORKS & set(REFUSED)


def test_what_transformers_fills_in_is_known() -> None:
    """A new version fills in something else? Put it into the table."""
    fresh = TrainingArguments(output_dir="x", use_cpu=True, report_to="none")
    for name in set(FIELDS) & set(REFUSED):
        value, default = getattr(fresh, name), _default(FIELDS[name])
        if name != "remove_unused_columns" and (value or default):
            assert value == FILLED_IN.get(name, default), name


def test_looking_at_the_arguments_joins_no_other_process() -> None:
    code = """
import torch
from vllm_mtp.training.arguments import DrafterTrainingArguments
from vllm_mtp.errors import MTPError
try:
    DrafterTrainingArguments(output_dir="x", skip_memory_metrics=False)
except MTPError as error:
    assert "skip_memory_metrics: got False" in str(error)
else:
    raise AssertionError
assert not torch.distributed.is_initialized()
"""
    launched = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29999",
    }
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=100, env=os.environ | launched
    )


# Another value than the default, as a flag and as what it becomes.
OTHER: dict[str, str] = {
    "hub_token": "hf_secret",
    "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
    "accelerator_config": '{"split_batches": true}',
    "fsdp_config": '{"min_num_params": 1}',
    "deepspeed": '{"zero_optimization": {"stage": 3}}',
    "include_num_input_tokens_seen": "true",
    "eval_do_concat_batches": "false",
    "average_tokens_across_devices": "false",
    "remove_unused_columns": "true",
    "skip_memory_metrics": "false",
    "hub_strategy": "end",
    "debug": "underflow_overflow",
    "neftune_noise_alpha": "5",
    "label_smoothing_factor": "0.1",
    "eval_accumulation_steps": "2",
}
# Objects, which argparse refuses already.
NO_FLAGS = {"parallelism_config", "liger_kernel_config"}


@pytest.mark.parametrize("name", sorted(set(REFUSED) & set(FIELDS) - NO_FLAGS))
def test_what_does_not_work_is_refused_in_one_line(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    value = OTHER.get(name)
    if value is None:
        value = "true" if "bool" in str(FIELDS[name].type) else "x"
    flag = f"--{name.replace('_', '-')}"
    assert main(["train", "--target", "t", "--data", "d", flag, value]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"vllm-mtp train: {flag}: got ")
    assert REFUSED[name] in error
    assert "hf_secret" not in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", sorted(NO_FLAGS))
def test_objects_are_refused(name: str, arguments: MakeArguments) -> None:
    with pytest.raises(MTPError, match=f"{name}: got {{'a': True}}, expected None"):
        arguments(**{name: {"a": True}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_MIXED_PRECISION", "fp16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),  # and no --bf16
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
    ],
)
def test_what_the_launcher_asks_for_is_refused(
    name: str, value: str, arguments: MakeArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(MTPError, match=f"{name}={value}"):
        arguments(bf16=False)


def test_what_the_launcher_says_by_default_is_taken(
    arguments: MakeArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    arguments(bf16=False)
    arguments(bf16=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    arguments(bf16=True)


WRONG: list[tuple[str, list[str]]] = [
    ("learning_rate", ["nan", "inf", "-1", "0"]),
    ("weight_decay", ["nan", "-1"]),
    ("max_grad_norm", ["nan", "-1"]),
    ("warmup_steps", ["nan", "-1"]),
    ("adam_beta1", ["nan", "1", "-0.1"]),
    ("adam_epsilon", ["nan", "0"]),
    ("num_train_epochs", ["nan", "inf", "0", "-1"]),
    ("max_steps", ["0", "-2"]),
    ("per_device_train_batch_size", ["0", "-1"]),
    ("per_device_eval_batch_size", ["0"]),
    ("gradient_accumulation_steps", ["0"]),
    ("logging_steps", ["nan", "0"]),
    ("eval_steps", ["nan", "0"]),
    ("save_steps", ["nan", "0"]),
    ("save_total_limit", ["0"]),
    ("eval_delay", ["nan"]),
    ("dataloader_num_workers", ["-1"]),
    ("ce_weight", ["nan", "-1"]),
    ("train_sampling_strategy", ["group_by_length", "x"]),
    ("lr_scheduler_type", ["x", "reduce_lr_on_plateau", "cosine_with_min_lr"]),
    ("lr_scheduler_kwargs", ["{", "[1]", '{"wings": 2}']),
    ("optim", ["x", "galore_adamw", "adamw_bnb_8bit", "adamw_apex_fused"]),
    ("optim_args", ["x"]),
    ("report_to", ["x", "wandb"]),
    ("log_level", ["x"]),
    ("metric_for_best_model", ["x", "eval_teacher_forced_position_9"]),
    ("ddp_backend", ["x"]),
    ("dataloader_prefetch_factor", ["2"]),
]


@pytest.mark.parametrize(
    ("name", "value"), [(name, v) for name, values in WRONG for v in values]
)
def test_wrong_values_are_one_line(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--target", "/nonexistent", "--data", "d", "--use_cpu", "true"]
    more = ["--optim", "lomo"] if name == "optim_args" else []
    try:
        code = main([*command, f"--{name}", value, *more])
    except SystemExit:  # argparse knows the choices
        error = capsys.readouterr().err.splitlines()[-1]
        assert "error: argument --" in error
        return
    error = capsys.readouterr().err
    assert code == 1
    assert error.count("\n") == 1
    assert "no such folder" not in error, "it went on to load the target"


def test_much_of_what_works_in_one_run(
    arguments: MakeArguments, tiny_llama: Path
) -> None:
    args = arguments(
        layers="own:3",
        max_steps=6,
        learning_rate=0.3,  # so that the last is not the best
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-4},
        warmup_steps=0.2,
        optim="adamw_torch",
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        data_seed=3,
        full_determinism=True,
        torch_empty_cache_steps=2,
        dataloader_num_workers=1,
        dataloader_drop_last=True,
        dataloader_persistent_workers=True,
        logging_first_step=True,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        do_train=True,
        do_eval=True,
    )
    metrics = train(args, tiny_llama)
    state = json.loads((Path(args.output_dir) / "trainer_state.json").read_text())
    name = "eval_teacher_forced_length"
    evaluated = {
        line["step"]: line[name] for line in state["log_history"][:-3] if name in line
    }
    assert set(evaluated) == {0, 2, 4, 6}
    saved = {step: value for step, value in evaluated.items() if step}
    best = max(saved, key=saved.__getitem__)
    # What is written, and measured last, is the best checkpoint.
    assert state["best_global_step"] == best
    assert metrics[name] == saved[best]
    written = load_drafter(args.output_dir).state_dict()
    kept = _checkpoint(Path(args.output_dir) / f"checkpoint-{best}")
    assert written.keys() <= kept.keys()
    for key, value in written.items():
        assert value.equal(kept[key].to(value.dtype)), key


def _checkpoint(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found = load_file(folder / "model.safetensors")
    return {key.removeprefix("drafter."): value for key, value in found.items()}
