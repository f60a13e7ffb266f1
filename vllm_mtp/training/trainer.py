# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer, taught what a batch and an evaluation are here."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from vllm_mtp import interrupts
from vllm_mtp.drafter.heads import pick_greedy
from vllm_mtp.drafter.layout import possible_anchors, span_ends
from vllm_mtp.files import writing
from vllm_mtp.metrics import AcceptanceCounts, count_accepted, mean_length
from vllm_mtp.torch_host.texts import TextBlocks, draft_texts
from vllm_mtp.training.arguments import DrafterTrainingArguments
from vllm_mtp.training.average import WeightAverage
from vllm_mtp.training.loss_module import MEASURES, LossModule
from vllm_mtp.training.optimizer import make_optimizer
from vllm_mtp.training.resume import write_checkpoint_config
from vllm_mtp.training.states import TrainingInputError
from vllm_mtp.training.step_labels import StepLabels
from vllm_mtp.training.too_short import WarnOfTooFewSteps


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of a split as tensors, numbered.

    Args:
        rows: With ``input_ids`` and ``loss_spans``.
        max_tokens: Longer texts are cut here.
        first: Number of the first row, so that splits do not share numbers.
    """

    def __init__(self, rows: Dataset, max_tokens: int, first: int = 0) -> None:
        self._rows = rows
        self._max_tokens = max_tokens
        self._first = first
        self._usable = [
            index
            for index, row in enumerate(rows)
            if len(self._anchors(row["loss_spans"], len(row["input_ids"])))
        ]
        if not self._usable:
            raise TrainingInputError(
                f"data: none of {len(rows)} texts has two of the target's own tokens "
                f"among its first {max_tokens}; raise max_text_tokens, or generate "
                "longer answers"
            )

    def _anchors(self, spans: Sequence[Sequence[int]], size: int) -> torch.Tensor:
        return possible_anchors(spans, min(size, self._max_tokens))

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self._rows[self._usable[number]]
        return {
            "index": self._first + number,
            "input_ids": torch.tensor(row["input_ids"][: self._max_tokens]),
            "loss_spans": row["loss_spans"],
        }


def collate(texts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch: the texts as they are. Blocks have one shape, texts need none."""
    return {"texts": list(texts)}


class DrafterTrainer(Trainer):
    """Trains a `LossModule`. Loop, schedules, checkpoints, resume, logging and several
    devices are transformers'."""

    args: DrafterTrainingArguments

    def __init__(self, loss_module: LossModule, **kwargs: Any) -> None:
        super().__init__(model=loss_module, data_collator=collate, **kwargs)
        self.add_callback(WarnOfTooFewSteps())
        self._average: WeightAverage | None = None
        if self.args.ema_decay is not None:
            self._average = WeightAverage(loss_module.drafter, self.args.ema_decay)
            self.add_callback(self._average)
        # The loss is divided by the counts of the whole step (`get_batch_samples`):
        # Trainer must sum over accumulated batches.
        self.model_accepts_loss_kwargs = True
        # Since the last line of the log, by name: a part's values, and the steps that
        # have it. A schedule may bring one in between two lines.
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._part_steps: dict[str, set[int]] = {}

    @property
    def loss_module(self) -> LossModule:
        return self.accelerator.unwrap_model(self.model)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Parameter groups with learning rates of their own."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.loss_module, self.args)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """A step's batches, and its labels where Trainer would count tokens.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed in some process.
        """
        self._stop_together()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        texts = [text for batch in batches for text in batch["texts"]]
        labels = self.loss_module.labels_of_step(
            texts, self.state.global_step, self._sum
        )
        return batches, labels

    def _stop_together(self) -> None:
        """Between two steps, so that no process waits for one that has stopped."""
        asked = torch.tensor([interrupts.asked()], dtype=torch.int64)
        if self._sum(asked.to(self.args.device)).item():
            interrupts.stop()

    def _sum(self, counts: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(counts)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The batch's loss; its parts go to the log.

        Raises:
            TrainingInputError: The loss is not finite.
            KeyboardInterrupt: Ctrl-C was pressed since the last batch, and there is no
                other process.
        """
        if self.args.world_size == 1:
            interrupts.stop_if_asked()
        whole: StepLabels | None = num_items_in_batch
        outputs = model(inputs["texts"], step=self.state.global_step, whole=whole)
        # Losses of the processes sum up, and gradients are averaged over them.
        loss = outputs["loss"] * self.args.world_size
        if not math.isfinite(loss.item()):
            parts = {name: value.item() for name, value in outputs.items()}
            raise TrainingInputError(
                f"step {self.state.global_step}: the loss is not finite ({parts}). "
                "Lower learning_rate (or placeholder_lr_scale), or set max_grad_norm"
            )
        for name, value in outputs.items():
            if name != "loss":
                self._parts.setdefault(name, []).append(value)
                self._part_steps.setdefault(name, set()).add(self.state.global_step)
        return (loss, outputs) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This process's share of the texts; it may be none.

        Trainer's own loader gives some texts to several processes, so that all have as
        many, and they would count several times.
        """
        texts: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        share = range(self.args.process_index, len(texts), self.args.world_size)
        args = self.args
        # Of Trainer's settings all but two: no text is dropped, and no worker stays
        # behind, since each evaluation has a loader of its own.
        return DataLoader(
            torch.utils.data.Subset(texts, share),
            batch_size=args.per_device_eval_batch_size,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for name, values in self._parts.items():
                total = self.accelerator.reduce(torch.stack(values).sum())
                key = name if name in MEASURES else f"loss_{name}"
                logs[key] = total.item() / len(self._part_steps[name])
            self._parts, self._part_steps = {}, {}
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
        with writing(folder, RuntimeError):  # torch.save's word for a full disk
            super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # Weights of the same shapes may belong to other layers: resuming compares.
        write_checkpoint_config(str(output_dir), self.loss_module.drafter.config)
        if self._average is not None:
            self._average.save(str(output_dir))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._average is not None:
            self._average.load(resume_from_checkpoint)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """As transformers makes it.

        Raises:
            TrainingInputError: The rate would begin to fall before the run begins.
        """
        args = self.args
        falls = (args.lr_scheduler_kwargs or {}).get("num_decay_steps", 0)  # type: ignore[union-attr]
        rises = args.get_warmup_steps(num_training_steps)
        if rises + falls > num_training_steps:
            raise TrainingInputError(
                f"lr_scheduler_kwargs: got num_decay_steps {falls}, behind {rises} "
                f"steps of warmup, but the run (or stage) has {num_training_steps} "
                "steps; lower it"
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """How many drafts behind held-out text are right (teacher-forced)."""
        batches = (self._prepare_inputs(batch)["texts"] for batch in dataloader)
        counts = self._count(batches)  # type: ignore[arg-type]
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in metrics_of(counts).items()}
        return EvalLoopOutput(
            predictions=(),  # type: ignore[arg-type]
            label_ids=None,
            metrics=metrics,
            num_samples=len(self.eval_dataset),  # type: ignore[arg-type]
        )

    @torch.no_grad()
    def _count(
        self, batches: Iterable[Sequence[Mapping[str, Any]]]
    ) -> AcceptanceCounts:
        num_draft_tokens = self.loss_module.drafter.config.num_speculative_tokens
        counts = AcceptanceCounts(0, 0, (0,) * num_draft_tokens)
        self.loss_module.eval()
        for texts in batches:
            if self.args.world_size == 1:
                interrupts.stop_if_asked()
            with self.accelerator.autocast():
                counts += self._draft([self._spread_blocks(text) for text in texts])
        flat = torch.tensor(
            [counts.drafts, counts.draft_tokens, *counts.accepted_per_position],
            device=self.args.device,
        )
        drafts, tokens, *positions = self._sum(flat).tolist()
        return AcceptanceCounts(drafts, tokens, tuple(positions))

    def _spread_blocks(self, text: Mapping[str, Any]) -> TextBlocks:
        """Evenly spread blocks, the same in every evaluation."""
        size, spans = len(text["input_ids"]), text["loss_spans"]
        anchors = possible_anchors(spans, size)
        # What comes behind the end is not known, so it would count as rejected.
        room = span_ends(anchors, spans, size) - anchors
        whole = anchors[room > self.loss_module.drafter.config.num_speculative_tokens]
        anchors = whole if len(whole) else anchors
        count = min(self.args.eval_anchors, len(anchors))
        chosen = torch.linspace(0, len(anchors) - 1, count).round().long()
        return self.loss_module.blocks_at(text, anchors[chosen])

    def _draft(self, texts: list[TextBlocks]) -> AcceptanceCounts:
        loss_module = self.loss_module
        num_draft_tokens = loss_module.drafter.config.num_speculative_tokens
        drafted, _ = draft_texts(
            loss_module.bound, texts, num_draft_tokens, pick_greedy
        )
        truth = torch.cat([text.labels(num_draft_tokens) for text in texts])
        return count_accepted(drafted, truth)


def metrics_of(counts: AcceptanceCounts) -> dict[str, float]:
    """The teacher-forced measures by name."""
    positions = {
        f"teacher_forced_position_{number}": rate
        for number, rate in enumerate(counts.acceptance_per_position, 1)
    }
    return {"teacher_forced_length": mean_length(counts), **positions}
