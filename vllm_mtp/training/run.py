# SPDX-License-Identifier: Apache-2.0
"""One training run, from its arguments to a drafter's folder."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn

from vllm_mtp.data.served_sampling import difference_from_served
from vllm_mtp.data.settings import OFF_POLICY
from vllm_mtp.data.several import Answers, differences, read_answers
from vllm_mtp.drafter.checkpoint import CONFIG_FILE, load_drafter, read_config
from vllm_mtp.drafter.cost import draft_cost
from vllm_mtp.drafter.layers import MLPLayer, OwnLayer
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.drafter.vocabulary import frequent_tokens, tokens_of
from vllm_mtp.engine import has_tokenizer, tokenizer_of
from vllm_mtp.errors import MTPError
from vllm_mtp.files import writing
from vllm_mtp.interrupts import deferred
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import load_frozen
from vllm_mtp.torch_host.new_drafter import new_drafter
from vllm_mtp.training.arguments import DrafterTrainingArguments
from vllm_mtp.training.bridges import bridged_layers, fit_bridges
from vllm_mtp.training.finish import finish
from vllm_mtp.training.growth import (
    computed_otherwise,
    draft_tokens,
    freeze_all_but_new_positions,
    require_same_but_positions,
    warm_start,
)
from vllm_mtp.training.loss_module import LossModule
from vllm_mtp.training.loss_vocabulary import LossVocabulary, own_token_counts
from vllm_mtp.training.resume import checkpoint_to_resume
from vllm_mtp.training.same import require_same_everywhere
from vllm_mtp.training.states import TrainingInputError
from vllm_mtp.training.trainer import DrafterTrainer, Texts

logger = logging.getLogger("vllm.mtp_placeholder.training")


class TrainingRun:
    """Everything that all stages of a run share.

    Args:
        args: What does not differ between them: data, types, device.
        target: The target's folder.
    """

    def __init__(self, args: DrafterTrainingArguments, target: Path) -> None:
        self.target = target
        self.facts = TargetFacts.from_folder(target)
        answers = read_answers(args.data, self.facts, target)
        self.train_rows, self.held_out_rows = answers.train, answers.held_out
        self._made_with = answers.settings[0]
        _warn_of(args.data, answers, target)
        sizes = f"{len(self.train_rows)} and {len(self.held_out_rows)} texts"
        require_same_everywhere("data", sizes)
        dtype = "bfloat16" if args.bf16 else "float32"
        device_map = None if args.target_device_map == "one" else args.target_device_map
        model = load_frozen(target, dtype, args.device, device_map)
        by_flex = args.block_attention == "flex"
        self.host = HFTarget(model, args.device, by_flex=by_flex)

    @cached_property
    def _counts(self) -> Counter[int]:
        # Goes through all texts, and only small vocabularies ask for it.
        return own_token_counts(self.train_rows)

    def frequent(self, size: int, first: Sequence[int] = ()) -> tuple[int, ...]:
        """The target's most frequent tokens in the training texts.

        Args:
            size: How many.
            first: Ids that are taken before all others.
        """
        tokens, special = self._tokens
        if not 0 < size <= len(tokens):
            raise MTPError(
                f"draft_vocab_size or loss_vocab_size: got {size}, expected 1 to "
                f"{len(tokens)}, the tokens that the target has"
            )
        return frequent_tokens(self._counts, [*first, *special], size, tokens)

    @cached_property
    def _tokens(self) -> tuple[Sequence[int], Sequence[int]]:
        """All tokens that the target can say, and those of them that are special."""
        vocab_size = self.facts.vocab_size
        if not has_tokenizer(self.target):
            return range(vocab_size), ()  # a target made in code
        tokenizer = tokenizer_of(self.target, self._made_with.engine.tokenizer_mode)
        return tokens_of(tokenizer, vocab_size), tokenizer.all_special_ids

    def _draft_tokens(self, args: DrafterTrainingArguments) -> tuple[int, ...] | None:
        """The reduced vocabulary: what ``warm_start`` can draft, and then by count."""
        size = args.draft_vocab_size
        if not size:
            return None
        known = draft_tokens(args.warm_start) if args.warm_start else None
        fits = known is not None and len(known) <= size
        return self.frequent(size, known if known is not None and fits else ())

    def new_drafter(self, args: DrafterTrainingArguments) -> Drafter:
        """A new drafter of one stage, with trainable weights in float32."""
        drafter = new_drafter(
            self.target,
            args.layers,
            args.num_speculative_tokens,
            args,
            self._draft_tokens(args),
        )
        return drafter.float().to(args.device)

    def trainer(
        self, drafter: Drafter, args: DrafterTrainingArguments
    ) -> DrafterTrainer:
        """A trainer for one stage."""
        size = args.loss_vocab_size
        candidates = None
        if size:
            tokens = torch.tensor(self.frequent(size), device=args.device)
            candidates = LossVocabulary(tokens, self.facts.vocab_size)
        loss_module = LossModule(drafter, self.host, args.plan(), candidates)
        require_trainable(loss_module)
        texts = _first(self.train_rows, args.train_texts or len(self.train_rows))
        train = Texts(texts, args.max_text_tokens)
        held_out = _first(self.held_out_rows, args.eval_texts)
        return DrafterTrainer(
            loss_module,
            args=args,
            train_dataset=train,
            eval_dataset=Texts(held_out, args.max_text_tokens, first=len(train)),
        )

    def is_finished(self, stage: DrafterTrainingArguments) -> bool:
        """Whether a stage's folder holds its drafter already.

        Raises:
            TrainingInputError: It holds another one, or not all processes see it.
        """
        folder = Path(str(stage.output_dir))
        is_there = (folder / CONFIG_FILE).exists()
        require_same_everywhere("output_dir", f"{folder} is finished: {is_there}")
        if not is_there:
            return False
        if read_config(folder) != self.new_drafter(stage).config:
            raise TrainingInputError(
                f"{folder}: holds a drafter of other settings than this stage; use "
                "the settings that it was trained with, or another output_dir"
            )
        return True


def _warn_of(folders: Sequence[str], answers: Answers, target: Path) -> None:
    for folder, settings in zip(folders, answers.settings, strict=True):
        if settings.is_off_policy:
            logger.warning("%s: %s", folder, OFF_POLICY)
        elif said := difference_from_served(settings.sampling, target):
            logger.warning("%s: %s", folder, said)
    for line in differences(folders, answers.settings):
        logger.warning("%s", line)
    if answers.dropped:
        logger.warning(
            "data: %d texts are not trained on: another folder holds their prompts "
            "out (a larger --held-out)",
            answers.dropped,
        )


def _first(rows: Dataset, count: int) -> Dataset:
    return rows.select(range(min(count, len(rows))))


def train(args: DrafterTrainingArguments, target: Path) -> dict[str, float]:
    """Train a drafter and write its folder, ``args.output_dir``.

    Stages are trained first, each in a folder of its own inside it, and skipped
    where that folder is finished.

    Args:
        args: The settings.
        target: The target's folder.

    Returns:
        The last evaluation's metrics.

    Raises:
        MTPError: Settings, data or target do not fit; the message says which.
    """
    run = TrainingRun(args, target)
    start = args.warm_start
    for number, layers in enumerate(args.stages, 1):
        stage = replace(
            args,
            layers=layers,
            warm_start=start,
            max_steps=args.stage_steps,
            output_dir=str(Path(str(args.output_dir), f"stage-{number}")),
        )
        if not run.is_finished(stage):
            _train_stage(run, stage)
        start = stage.output_dir
    return _train_stage(run, replace(args, warm_start=start) if args.stages else args)


def _train_stage(run: TrainingRun, args: DrafterTrainingArguments) -> dict[str, float]:
    started = datetime.now(timezone.utc)
    fitted = fit(run, args)
    trainer = fitted.trainer
    if trainer.is_world_process_zero():
        finish(
            trainer.loss_module,
            args,
            run.target,
            _first(run.held_out_rows, args.eval_texts),
            started=started,
            steps=trainer.state.global_step,
            checkpoint=fitted.checkpoint,
        )
    # The next stage reads what the first process has written.
    trainer.accelerator.wait_for_everyone()
    return fitted.metrics


def _fit_bridges(trainer: DrafterTrainer, args: DrafterTrainingArguments) -> None:
    bound = trainer.loss_module.bound
    if bridged_layers(bound.drafter):
        texts = trainer.train_dataset
        count = min(args.bridge_texts, len(texts))  # type: ignore[arg-type]
        with args.autocast():
            fit_bridges(bound, [texts[i] for i in range(count)])  # type: ignore[index]


class Fitted(NamedTuple):
    """A trained drafter that is not written yet."""

    trainer: DrafterTrainer
    metrics: dict[str, float]  # of the last evaluation
    checkpoint: Path | None  # what the run went on from


def fit(run: TrainingRun, args: DrafterTrainingArguments) -> Fitted:
    """Train one stage, measure it on held-out text and log what it costs."""
    drafter = run.new_drafter(args)
    if args.warm_start:
        _warm_start(drafter, args)
    trainer = run.trainer(drafter, args)
    checkpoint = checkpoint_to_resume(
        args.resume_from_checkpoint,
        Path(str(args.output_dir)),
        trainer.loss_module,
        averages=args.ema_decay is not None,
    )
    require_same_everywhere("output_dir", f"goes on from {checkpoint}")
    if args.bridge_texts and not (args.warm_start or checkpoint):
        _fit_bridges(trainer, args)
    with deferred():  # until a step of training or evaluation is done
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        metrics = trainer.evaluate()
        trainer.log(_costs(drafter))
        with writing(str(args.output_dir)):
            trainer.save_state()
    return Fitted(trainer, metrics, checkpoint)


def require_trainable(loss_module: LossModule) -> None:
    """Refuse a drafter without a weight to train.

    Raises:
        TrainingInputError: With what to add.
    """
    drafter, num_taught = loss_module.drafter, loss_module.num_draft_tokens
    weights: Iterable[nn.Parameter] = trainable_weights(drafter)
    if num_taught == 1:
        # Placeholders, LoRA and the Markov correction act behind the first position;
        # LoRA on all of them where a hidden state enters.
        kinds: Any = OwnLayer | MLPLayer
        if drafter.config.input == "boundary":
            kinds = nn.Module
        own = [layer for layer in drafter.layers if isinstance(layer, kinds)]
        others = (drafter.chain, drafter.lm_heads)
        own += [module for module in others if module is not None]
        weights = nn.ModuleList(own).parameters()
    if not any(weight.requires_grad for weight in weights):
        raise TrainingInputError(
            f"layers: nothing to train at {num_taught} taught position(s); shared "
            "layers without LoRA have no weights, and LoRA, placeholders and a Markov "
            "correction act behind the first position. Ask for own layers, or for more "
            "num_speculative_tokens (or train_places), lora_rank or markov_rank"
        )


def trainable_weights(drafter: Drafter) -> list[nn.Parameter]:
    """All that can be trained: noise placeholders are the target's embeddings."""
    noise = drafter.placeholders if drafter.config.noise else None
    return [weight for weight in drafter.parameters() if weight is not noise]


def _costs(drafter: Drafter) -> dict[str, float]:
    """What was trained, and what a draft reads of a target step's weights."""
    trained = [p.numel() for p in drafter.parameters() if p.requires_grad]
    return {
        "trained_parameters": sum(trained),
        "draft_weights": draft_cost(drafter.config).relative_weights,
    }


def _warm_start(drafter: Drafter, args: DrafterTrainingArguments) -> None:
    assert args.warm_start is not None
    source = load_drafter(args.warm_start, dtype=torch.float32, device=args.device)
    left = warm_start(drafter, source)
    keys = sorted(set(computed_otherwise(drafter, source).values()))
    logger.info(
        "warm start from %s; new: %s%s",
        args.warm_start,
        ", ".join(left) or "nothing",
        f" (what is computed otherwise there is not taken: {', '.join(keys)})"
        if keys
        else "",
    )
    if args.train_only == "new_positions":
        require_same_but_positions(drafter, source)
        num_old = source.config.num_speculative_tokens
        freeze_all_but_new_positions(drafter, num_old, args.train_places)
