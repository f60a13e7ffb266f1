# SPDX-License-Identifier: Apache-2.0
"""A target that is being trained keeps its drafter.

Another trainer (TRL's SFTTrainer and GRPOTrainer, transformers' Trainer) trains the
target; its drafter is trained beside it, on the same batches and on the states that the
target has by then. To the trainer it is as if nobody were there: no gradient reaches
the target, and no random number is drawn.
"""

import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, get_scheduler
from transformers.trainer_utils import get_last_checkpoint

from vllm_mtp.drafter.checkpoint import load_drafter
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.plugin import METHOD
from vllm_mtp.sharing.provenance import parent_record
from vllm_mtp.training.co_training.batch_texts import texts_of
from vllm_mtp.training.co_training.folder import (
    Story,
    read_state,
    write_folder,
    write_state,
)
from vllm_mtp.training.co_training.live_target import LiveTarget
from vllm_mtp.training.co_training.measures import measure, named
from vllm_mtp.training.co_training.settings import CoTrainingSettings, checked
from vllm_mtp.training.loss_module import LossModule
from vllm_mtp.training.optimizer import own_matrices
from vllm_mtp.training.run import require_trainable, trainable_weights
from vllm_mtp.training.states import TrainingInputError


def co_train(
    trainer: Any, drafter: Drafter | Path | str, **settings: Any
) -> "CoTraining":
    """Let a trainer train a drafter of its model too; call it before ``train()``.

    The drafter learns at the end of each optimizer step, from the step's texts: what
    the target learns to write there (labels that are not -100; with GRPO, the
    completions). Its measures come with the trainer's own log, as ``drafter/...``.
    Wherever the trainer saves the target, checkpoints included, the drafter is saved in
    the folder ``mtp_placeholder`` inside, where vLLM finds it by the target.

    Args:
        trainer: SFTTrainer, GRPOTrainer, or another of transformers' `Trainer`s whose
            batches `batch_texts.texts_of` knows.
        drafter: Made for the model: its folder, or a `Drafter`, which is trained in
            place, without the weights that are frozen in it. It must be the same in
            all processes.
        settings: See `CoTrainingSettings`.

    Raises:
        MTPError: Settings, drafter, model or trainer do not go together; the message
            says which.
    """
    if any(isinstance(c, CoTraining) for c in trainer.callback_handler.callbacks):
        raise TrainingInputError(
            "co_train: this trainer trains a drafter already; make another trainer"
        )
    co_training = CoTraining(trainer, drafter, checked(settings))
    trainer.add_callback(co_training)
    return co_training


class CoTraining(TrainerCallback):
    """Trains a drafter beside a trainer's model; made by `co_train`.

    Four methods of the trainer are wrapped, of this one object: a callback is shown
    neither batches nor where a model is saved or resumed from, and comes too late to
    add to the log.

    Attributes:
        drafter: What is trained, in float32.
    """

    def __init__(
        self, trainer: Any, drafter: Drafter | Path | str, settings: CoTrainingSettings
    ) -> None:
        self._trainer, self._settings, self._parent = trainer, settings, None
        if not isinstance(drafter, Drafter):
            folder, drafter = drafter, load_drafter(drafter)
            self._parent = parent_record(Path(folder), str(folder))
            for weight in trainable_weights(drafter):
                weight.requires_grad_(True)
        self._target = LiveTarget(trainer)
        self.drafter = drafter
        facts = self._facts()
        self._require_weights()
        self._require_heads()
        # A user's drafter is changed only once nothing refuses it.
        require_trainable(self._new_loss_module())
        drafter.config = drafter.config.model_copy(update={"target": facts})
        drafter.float().to(trainer.args.device)
        self._loss_module = self._new_loss_module()
        if settings.gradient_checkpointing:
            self._loss_module.gradient_checkpointing_enable()
        self._optimizer: Any = None
        self._schedule: Any = None
        self._started = datetime.now(timezone.utc)
        self._resumed_from: Path | None = None
        self._resumed_from_step = self._steps = 0
        self._batches: list[list[dict[str, Any]]] = []
        self._last: list[dict[str, Any]] = []  # with texts, for the probe
        self._is_measured = False
        self._forget_measures()
        self._wrap()

    def save(self, folder: Path | str, target: Path | str | None = None) -> Path:
        """Write the drafter as it is now, ready to be served.

        Args:
            folder: Its own.
            target: The folder that the target was just saved to; None for none.

        Returns:
            The folder.

        Raises:
            OutputError: It cannot be written.
        """
        story = Story(
            trainer=self._trainer,
            settings=self._settings,
            parent=self._parent,
            started=self._started,
            optimizer_steps=self._steps,
            resumed_from_step=self._resumed_from_step,
        )
        with self._target.as_read(), self._target.autocast():
            self._follow_copies()
            return write_folder(
                Path(folder),
                None if target is None else Path(target),
                self._loss_module.bound,
                story,
                self._last,
            )

    def _new_loss_module(self) -> LossModule:
        host, plan = self._target.host, self._settings.plan()
        # What LoRA acts in are copies of the target's modules: they keep their mode.
        with self._target.as_read():
            return LossModule(self.drafter, host, plan)

    def _facts(self) -> TargetFacts:
        """Of this target, which has a name of its own and which the drafter fits."""
        config = self.drafter.config
        name = Path(self._trainer.args.output_dir).resolve().name
        facts = TargetFacts.from_hf_config(self._target.model.config, name=name)
        config.target.require_same(facts)
        # Of names and shapes alone, which training does not change.
        known = {"weights_fingerprint": config.target.weights_fingerprint}
        return facts.model_copy(update=known)

    def _require_weights(self) -> None:
        weights = trainable_weights(self.drafter)
        if weights and not any(weight.requires_grad for weight in weights):
            raise TrainingInputError(
                "co_train: drafter: all of its weights are frozen, as load_drafter "
                "gives them; call requires_grad_() on what is to be trained, or give "
                "the drafter's folder"
            )
        matrices = own_matrices(self.drafter)
        is_muon = self._settings.own_optimizer == "muon"
        if is_muon and not any(weight.requires_grad for weight in matrices):
            raise TrainingInputError(
                "co_train: own_optimizer: got 'muon', but the drafter has no own layer "
                "to train; leave it out, or use a drafter with own layers"
            )

    def _require_heads(self) -> None:
        head = self._target.model.get_output_embeddings()
        vocab = self.drafter.draft_vocab
        if vocab is not None and hasattr(head, "base_layer"):
            raise UnsupportedTargetError(
                "co_train: the LM head has an adapter of peft, which the rows that a "
                "reduced draft vocabulary copies of it would leave out; take the head "
                "out of target_modules, or use a drafter with draft_vocab_size null"
            )
        facts, most = self.drafter.config.target, self._settings.teacher_tokens
        scored = facts.vocab_size if vocab is None else len(vocab.token_ids)
        if self._settings.plan().objective.needs_teacher and most > scored:
            raise TrainingInputError(
                f"co_train: teacher_tokens: got {most}, expected at most the {scored} "
                "tokens that the drafter scores"
            )

    def _wrap(self) -> None:
        trainer = self._trainer
        self._compute_loss, self._log = trainer.compute_loss, trainer.log
        self._save_model, self._train = trainer.save_model, trainer.train
        trainer.compute_loss = self._compute_loss_and_keep_texts
        trainer.log = self._log_with_measures
        trainer.save_model = self._save_model_and_drafter
        trainer.train = self._train_from

    def _train_from(
        self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        found = resume_from_checkpoint
        if found is True:
            found = get_last_checkpoint(self._trainer.args.output_dir)
        self._resumed_from = Path(found) if found else None
        if self._resumed_from is not None:
            self._read_state(self._resumed_from)  # before hours are lost
        return self._train(resume_from_checkpoint, *args, **kwargs)

    def _compute_loss_and_keep_texts(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        trainer, settings = self._trainer, self._settings
        step = trainer.state.global_step + 1
        if trainer.model.training and step % settings.every == 0:
            # By its number a text has its blocks; no two of a step have the same.
            first = trainer.args.process_index << 32
            first += sum(map(len, self._batches))
            self._batches.append(texts_of(inputs, settings.max_text_tokens, first))
        return self._compute_loss(model, inputs, *args, **kwargs)

    def _log_with_measures(
        self, logs: dict[str, float], *args: Any, **kwargs: Any
    ) -> None:
        if "loss" in logs:  # of training
            logs |= {f"drafter/{name}": v for name, v in self._measures().items()}
            self._forget_measures()
        self._log(logs, *args, **kwargs)

    def _save_model_and_drafter(
        self, output_dir: str | None = None, _internal_call: bool = False
    ) -> None:
        self._save_model(output_dir, _internal_call=_internal_call)
        args = self._trainer.args
        if not args.should_save:
            return  # another process does
        folder = Path(args.output_dir if output_dir is None else output_dir)
        self.save(folder / METHOD, folder)
        is_checkpoint = _internal_call and self._optimizer is not None
        if is_checkpoint and not args.save_only_model:
            state = {
                "config": self._config(),
                "drafter": self.drafter.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "schedule": self._schedule.state_dict(),
                "steps": self._steps,
            }
            write_state(folder, state)

    def _config(self) -> str:
        """As JSON, without the target: it is the same by its facts."""
        return self.drafter.config.model_dump_json(exclude={"target"})

    def _read_state(self, checkpoint: Path) -> dict[str, Any]:
        return read_state(checkpoint, self._config())

    def _load_state(self, checkpoint: Path) -> None:
        state = self._read_state(checkpoint)
        self.drafter.load_state_dict(state["drafter"])
        try:
            self._optimizer.load_state_dict(state["optimizer"])
        except ValueError:  # torch's word for other groups
            raise TrainingInputError(
                f"co_train: {checkpoint}: its optimizer trains other weights, or in "
                "other groups; use the settings (own_optimizer, placeholder_lr_scale, "
                "markov_lr_scale, weight_decay) and the frozen weights that the run "
                "began with"
            ) from None
        self._schedule.load_state_dict(state["schedule"])
        self._steps = state["steps"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin anew, or where the checkpoint left off."""
        settings = self._settings
        self._optimizer = settings.optimizer(self.drafter)
        self._schedule = get_scheduler(
            settings.lr_scheduler_type,
            self._optimizer,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=max(1, state.max_steps // settings.every),
        )
        self._resumed_from_step, self._steps = state.global_step, 0
        self._batches = []
        self._forget_measures()
        if self._resumed_from is not None:
            self._load_state(self._resumed_from)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Train on the step's texts. The target's activations and gradients are gone
        by now, so the memory of the two does not add up."""
        batches, self._batches = [b for b in self._batches if b], []
        if state.global_step % self._settings.every == 0:
            with self._target.as_read(), torch.enable_grad():
                self._follow_copies()
                self._step(batches, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Where the trainer went back to its best checkpoint, the drafter does too."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_state(Path(state.best_model_checkpoint))

    @torch.no_grad()
    def _follow_copies(self) -> None:
        """Take anew what the drafter copies of the target: the head's rows of a reduced
        vocabulary, and the embeddings of noise tokens."""
        bound, vocab = self._loss_module.bound, self.drafter.draft_vocab
        if vocab is not None:
            bound.small_head = bound.target.logits_of_tokens(vocab.token_ids)
        noise, placeholders = self.drafter.config.noise, self.drafter.placeholders
        if noise is not None and placeholders is not None:
            ids = torch.tensor(noise.token_ids, device=placeholders.device)
            placeholders.copy_(bound.target.embed(ids))

    def _step(self, batches: list[list[dict[str, Any]]], step: int) -> None:
        if batches:
            self._last = batches[-1]
            if not self._is_measured:  # before the drafter has learnt from them
                with self._target.autocast():
                    self._sums += measure(self._loss_module, self._last, step).cpu()
                self._is_measured = True
        all_texts = [text for texts in batches for text in texts]
        whole = self._loss_module.labels_of_step(all_texts, step, self._sum)
        if not whole.total.item():
            return  # no process has a text
        for texts in batches:
            with self._target.autocast():
                loss = self._loss_module(texts, step, whole)["loss"]
            if not math.isfinite(loss.item()):
                raise TrainingInputError(
                    f"co_train: step {step}: the drafter's loss is not finite; lower "
                    "learning_rate (or placeholder_lr_scale), and resume from the last "
                    "checkpoint"
                )
            loss.backward()
            self._loss += loss.item()
        self._logged_steps += 1
        weights = [w for group in self._optimizer.param_groups for w in group["params"]]
        if self._trainer.accelerator.num_processes > 1:
            for weight in weights:
                # Every process has to take part, whatever it has.
                own = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = self._sum(own)
        torch.nn.utils.clip_grad_norm_(weights, self._settings.max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        self._steps += 1
        self._optimizer.zero_grad()

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over all processes."""
        return self._trainer.accelerator.reduce(tensor, "sum")

    def _forget_measures(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64)  # this process's part
        self._logged_steps = 0  # since the last line, the same in all processes
        positions = self._loss_module.num_draft_tokens
        self._sums = torch.zeros(5, positions, dtype=torch.float64)
        self._is_measured = False

    def _measures(self) -> dict[str, float]:
        """Since the last line of the log, over all processes."""
        device, steps = self._trainer.accelerator.device, self._logged_steps
        total, sums = (
            self._sum(tensor.to(device)).cpu() for tensor in (self._loss, self._sums)
        )
        return ({"loss": total.item() / steps} if steps else {}) | named(sums)
