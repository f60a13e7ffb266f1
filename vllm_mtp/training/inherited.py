# SPDX-License-Identifier: Apache-2.0
"""Which of transformers' training arguments work for a drafter, and which are refused.

A flag that does nothing, or fails hours later, is worse than one that is refused. Each
field of `transformers.TrainingArguments` is in one of the two tables; a test fails
where a new version of transformers has one that is in neither.
"""

import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from vllm_mtp.errors import MTPError

WORKS = frozenset((
    "output_dir", "resume_from_checkpoint", "seed", "data_seed", "full_determinism",
    "use_cpu", "local_rank", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps",
    "train_sampling_strategy", "ignore_data_skip",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "gradient_checkpointing", "bf16", "tf32",
    "torch_empty_cache_steps", "logging_strategy",
    "logging_steps", "logging_first_step", "logging_nan_inf_filter",
    "log_on_each_node", "log_level", "log_level_replica", "disable_tqdm", "report_to",
    "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "eval_strategy", "eval_steps", "eval_delay",
    "eval_on_start", "per_device_eval_batch_size", "save_strategy", "save_steps",
    "save_on_each_node", "save_total_limit", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "dataloader_drop_last",
    "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order",
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph", "ddp_backend", "ddp_timeout", "do_train", "do_eval",
))  # fmt: skip

_NO_PREDICTIONS = "evaluations count right drafts and keep no predictions; leave it out"
_ONE_COPY = (
    "a drafter is trained whole on each device, beside its frozen target; leave it out"
)
_COMPILED = "the blocks of a step differ in shape from step to step; leave it out"
_PUSHED = "leave it out, and upload the finished drafter with `vllm-mtp push`"
_FUSED = "it replaces parts of whole language models; leave it out"
_LENGTHS = "texts are not padded, so they need no sorting; leave it out"

REFUSED: Mapping[str, str] = {
    "gradient_checkpointing_kwargs": "layers are recomputed in one way; leave it out",
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "use_liger_kernel": _FUSED,
    "liger_kernel_config": _FUSED,
    "use_cache": "training keeps no cache of its own; leave it out",
    "neftune_noise_alpha": "the embeddings are the frozen target's; leave it out",
    "label_smoothing_factor": "the losses are ce_weight, kl_weight, tv_weight and "
    "acceptance_weight; kl_weight teaches the target's own distribution",
    "average_tokens_across_devices": "losses are means over the labels of all devices "
    "already; leave it out",
    "auto_find_batch_size": "lower per_device_train_batch_size or anchors_per_text "
    "where memory is short",
    "optim_target_modules": "optimizers of single layers (GaLore and the like) are not "
    "supported; leave it out",
    "fp16": "float16 is too narrow for the target's states; write bf16",
    "fp16_full_eval": "evaluations run in the type of training; leave it out",
    "bf16_full_eval": "evaluations run in the type of training; leave it out",
    "include_num_input_tokens_seen": "a step is counted in blocks, not in tokens of "
    "its texts; leave it out",
    "prediction_loss_only": _NO_PREDICTIONS,
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "eval_accumulation_steps": _NO_PREDICTIONS,
    "include_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "do_predict": _NO_PREDICTIONS,
    "label_names": _NO_PREDICTIONS,
    "save_only_model": "a run could not go on from such a checkpoint; lower "
    "save_total_limit where room is short",
    "enable_jit_checkpoint": "`train` handles signals itself; write save_steps",
    "restore_callback_states_from_checkpoint": "there are none; leave it out",
    "push_to_hub": _PUSHED,
    "hub_token": _PUSHED,
    "hub_private_repo": _PUSHED,
    "hub_model_id": _PUSHED,
    "hub_strategy": _PUSHED,
    "hub_always_push": _PUSHED,
    "hub_revision": _PUSHED,
    "accelerator_config": "how batches are split is decided here; leave it out",
    "parallelism_config": _ONE_COPY,
    "fsdp": _ONE_COPY,
    "fsdp_config": _ONE_COPY,
    "deepspeed": _ONE_COPY,
    "remove_unused_columns": "a batch holds texts, not columns; leave it out",
    "length_column_name": _LENGTHS,
    "debug": "it looks for layers of whole language models; leave it out",
    "skip_memory_metrics": "memory is not measured; leave it out",
}
# Defaults after transformers' own changes to them. No arguments are made here to look:
# where there are several processes, that joins them, before the user's own settings.
FILLED_IN: Mapping[str, Any] = {"accelerator_config": AcceleratorConfig(), "debug": []}
# What `accelerate launch` asks for without a flag of ours.
_REFUSED_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": _ONE_COPY,
    "ACCELERATE_USE_DEEPSPEED": _ONE_COPY,
    "ACCELERATE_USE_MEGATRON_LM": _ONE_COPY,
    "ACCELERATE_USE_PARALLELISM_CONFIG": _ONE_COPY,
    "ACCELERATE_DYNAMO_BACKEND": _COMPILED,
    "ACCELERATE_MIXED_PRECISION": "--bf16 says the type of training; give both the "
    "same, bf16, or launch with --mixed_precision no",
}


def refuse_inherited(args: TrainingArguments) -> None:
    """Refuse what does not work for a drafter.

    Args:
        args: As the user gave them, or as transformers has filled them in.

    Raises:
        MTPError: Names the flag, what was got, and what to do.
    """
    for field in fields(args):
        if field.name not in REFUSED:
            continue
        value, expected = getattr(args, field.name), _default(field)
        filled_in = FILLED_IN.get(field.name, expected)
        if not value and (not expected or expected == "no"):
            continue  # argparse has several ways to say nothing
        if value not in (expected, filled_in):
            got = "a value" if field.name.endswith("_token") else repr(value)
            raise MTPError(
                f"{field.name}: got {got}, expected {expected!r}, which is the "
                f"default: {REFUSED[field.name]}"
            )
    _refuse_environment("bf16" if args.bf16 else "no")


def _refuse_environment(precision: str) -> None:
    nothing = {"", "no", "0", "false", "off", "n", "f"}
    for name, why in _REFUSED_ENVIRONMENT.items():
        value = os.environ.get(name, "")
        same = name == "ACCELERATE_MIXED_PRECISION" and value.lower() == precision
        if value.lower() not in nothing and not same:
            raise MTPError(
                f"the environment says {name}={value}, as `accelerate launch` sets it: "
                f"{why}"
            )


def _default(field: "Field[Any]") -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default
