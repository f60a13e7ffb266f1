# SPDX-License-Identifier: Apache-2.0
"""A short run of transformers' own trainer with `co_train`, in a test or as a process.

torchrun --nproc_per_node 2 -m tests.training.co_trained TARGET DRAFTER OUT
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from transformers.models.auto import AutoModelForCausalLM

from vllm_mtp import co_train

SETTINGS: dict[str, Any] = {
    "learning_rate": 2e-2,
    "placeholder_lr_scale": 1.0,
    "own_optimizer": "muon",
    "lr_scheduler_type": "constant",
    "anchors_per_text": 8,
}
ARGUMENTS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 2,
    "save_steps": 4,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
}


def model_of(target: Path, dropout: float = 0.2) -> Any:
    """Dropout draws random numbers, so that a drafter that draws some shows."""
    return AutoModelForCausalLM.from_pretrained(target, attention_dropout=dropout)


class Causal:
    """As `DataCollatorForLanguageModeling` gives it, without a tokenizer."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        labels = ids.clone()
        labels[:, :4] = -100
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": torch.ones_like(ids),
        }


ROWS = Dataset.from_list(
    [{"input_ids": [5 + (7 * n + 3 * i) % 150 for i in range(16)]} for n in range(16)]
)


def plain_trainer(model: Any, out: Path, **arguments: Any) -> Trainer:
    """transformers' own, which needs no TRL."""
    torch.manual_seed(1)
    args = TrainingArguments(str(out), **ARGUMENTS | arguments)
    return Trainer(
        model, args, train_dataset=ROWS, eval_dataset=ROWS, data_collator=Causal()
    )


def main(target: str, drafter: str, out: str) -> None:
    """Half of each batch of a process alone."""
    trainer = plain_trainer(
        model_of(Path(target), dropout=0.0), Path(out), per_device_train_batch_size=1
    )
    co_train(trainer, drafter, **SETTINGS | {"anchors_per_text": 64})
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
