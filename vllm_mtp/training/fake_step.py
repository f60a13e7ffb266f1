# SPDX-License-Identifier: Apache-2.0
"""One real training step of a target of any size, with tensors that have no storage.

The code that runs is that of training: the target's own forward, `LossModule`, its
backward pass, clipping, and the optimizer. What cannot run on numbers that are not
there is taken from elsewhere: how the target calls its layers from a small model of its
family, and states are not looked through for faults. Token ids, anchors and labels are
real, as positions follow from them.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from vllm_mtp.drafter.model import Drafter
from vllm_mtp.torch_host.at_once import as_on_gpu
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import class_of
from vllm_mtp.torch_host.target_states import TargetStates
from vllm_mtp.torch_host.without_weights import BareTarget, drafter_config, small_host
from vllm_mtp.training.arguments import DrafterTrainingArguments
from vllm_mtp.training.loss_module import LossModule
from vllm_mtp.training.loss_vocabulary import LossVocabulary
from vllm_mtp.training.memory_watch import MemoryWatch
from vllm_mtp.training.optimizer import make_optimizer
from vllm_mtp.training.step_memory import (
    AVERAGE,
    DRAFTER,
    GRADIENTS,
    OPTIMIZER,
    STATES,
    TARGET,
)

FORWARD, BACKWARD = "forward", "backward"
# Tokens of a text that are the prompt's, as a part of it: no block stands there.
_PROMPT = 0.1


@dataclass(frozen=True)
class StepTrace:
    """What a step keeps in memory.

    Attributes:
        peak: Bytes by kind, at the moment when there are most.
    """

    peak: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.peak.values())


class _States:
    """Stands in for `StatesSource`, which looks at the numbers and keeps states."""

    def __init__(
        self,
        host: HFTarget,
        layers: Collection[int],
        streams: Collection[int],
        watch: MemoryWatch,
    ) -> None:
        self._host, self._layers, self._streams = host, layers, streams
        self._watch = watch

    def get(self, key: int, token_ids: torch.Tensor) -> TargetStates:
        with self._watch.labelled(STATES):
            return self._host.encode(
                token_ids, cached=self._layers, streams=self._streams
            )


def fake_step(target: BareTarget, args: DrafterTrainingArguments) -> StepTrace:
    """Run a step of a run at its largest: every text has ``max_text_tokens`` and as
    many blocks as it may have.

    Args:
        target: The target.
        args: The settings.

    Raises:
        MTPError: The target or the settings do not go.
    """
    watch = MemoryWatch()
    module, texts = fake_module(target, args, watch)
    with as_on_gpu():
        return watched_step(module, texts, args, watch)


def watched_step(
    module: LossModule,
    texts: Sequence[Mapping[str, Any]],
    args: DrafterTrainingArguments,
    watch: MemoryWatch,
) -> StepTrace:
    """Run a step whose optimizer has its states already, behind all steps in which less
    is taught.

    Args:
        module: Of fake tensors, or of real ones; its weights are changed.
        texts: A batch.
        args: The settings.
        watch: Counts the tensors.
    """
    weights = [p for p in module.parameters() if p.requires_grad]
    optimizer = make_optimizer(module, args)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    for weight in module.host.model.parameters():
        watch.count(weight, TARGET)
    for weight in module.parameters():
        watch.count(weight, DRAFTER)
    average: list[torch.Tensor] = []
    if args.ema_decay is not None:
        average += map(torch.empty_like, module.parameters())
    for tensor in average:
        watch.count(tensor, AVERAGE)
    for state in optimizer.state.values():
        for tensor in state.values():
            if isinstance(tensor, torch.Tensor):
                watch.count(tensor, OPTIMIZER)
    hooks = [
        weight.register_post_accumulate_grad_hook(
            lambda weight: watch.count(weight.grad, GRADIENTS)
        )
        for weight in weights
    ]
    step = args.ce_start_steps + args.curriculum_steps * args.num_speculative_tokens
    with watch:
        with watch.labelled(FORWARD), _autocast(args):
            loss = module(texts, step=step)["loss"]
        with watch.labelled(BACKWARD):
            loss.backward()
            if args.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
        with watch.labelled(OPTIMIZER):
            optimizer.step()
    for hook in hooks:
        hook.remove()
    return StepTrace(watch.peak)


def fake_module(
    target: BareTarget, args: DrafterTrainingArguments, watch: MemoryWatch
) -> tuple[LossModule, list[dict[str, Any]]]:
    """The module that a run trains, of fake tensors, and a batch of texts for it."""
    config = drafter_config(target, args.layers, args.num_speculative_tokens, args)
    with FakeTensorMode(allow_non_fake_inputs=True):
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        with no_init_weights():
            model = class_of(target.config).from_config(target.config, dtype=dtype)
        drafter = Drafter(config)
    host = small_host(target.config).on(model.eval().requires_grad_(False))
    vocab_size = config.target.vocab_size
    if drafter.draft_vocab is not None:
        drafter.draft_vocab.token_ids = torch.arange(config.draft_vocab_size or 0)
    candidates = None
    if args.loss_vocab_size:
        candidates = LossVocabulary(torch.arange(args.loss_vocab_size), vocab_size)
    module = LossModule(drafter, host, args.plan(), candidates)
    source: Any = _States(host, module.cached_layers, module.streams, watch)
    module.states = source
    if args.gradient_checkpointing:
        module.gradient_checkpointing_enable()
    size = args.max_text_tokens
    texts = [
        {
            "index": index,
            "input_ids": torch.arange(size) % vocab_size,
            "loss_spans": [[int(size * _PROMPT), size]],
        }
        for index in range(args.per_device_train_batch_size)
    ]
    return module, texts


@contextmanager
def _autocast(args: DrafterTrainingArguments) -> Iterator[None]:
    # Fake tensors are on the CPU; the same operations are cast as on a GPU, but for a
    # few that training writes out in float32 anyway.
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        yield
