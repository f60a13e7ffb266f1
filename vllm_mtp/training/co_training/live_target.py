# SPDX-License-Identifier: Apache-2.0
"""A model that another trainer is training, read as a drafter's target."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from vllm_mtp.drafter.transformers_layers import depends_on_text_length
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import decoder_of
from vllm_mtp.training.states import TrainingInputError


class LiveTarget:
    """What a drafter reads of a model in training, which it leaves as it is.

    Args:
        trainer: transformers' `Trainer` or one of its kind; its ``model`` is whole in
            every process.

    Raises:
        TrainingInputError: The trainer keeps or runs its model in a way that a drafter
            cannot follow.
        UnsupportedTargetError: The model is no target of a drafter.

    Attributes:
        model: The causal language model, without peft's wrapping, but with the layers
            that peft has put into it.
        host: It as a drafter's host.
    """

    def __init__(self, trainer: Any) -> None:
        _require_followed(trainer)
        model = trainer.accelerator.unwrap_model(
            trainer.model, keep_torch_compile=False
        )
        _require_no_prompt_learning(model)
        self.model = model.get_base_model() if _is_peft(model) else model
        self.adapted = _is_peft(model)
        rotary = getattr(decoder_of(self.model), "rotary_emb", None)
        if rotary is not None and depends_on_text_length(rotary):
            raise UnsupportedTargetError(
                f"target {self.model.config.model_type!r} scales its RoPE by the "
                "text's length, which the drafter's host would have to change in the "
                "model that is trained; train the drafter afterwards, with `vllm-mtp "
                "train`"
            )
        if self.model.dtype == torch.float16:
            raise TrainingInputError(
                "co_train: the model is loaded in float16, in which gradients of the "
                "drafter overflow; load it in bfloat16 or float32"
            )
        self._autocasts = trainer.args.bf16 or self.model.dtype == torch.bfloat16
        # Without autocast, whose rounding is more than `require_followed` lets pass.
        with self.as_read():
            self.host = HFTarget(self.model)

    @contextmanager
    def as_read(self) -> Iterator[None]:
        """No dropout, no checkpointing of activations and no gradient into the model
        inside the block; behind it all is as before."""
        training = [module for module in self.model.modules() if module.training]
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        # By attribute: some modules do more in `eval` and `train`.
        for module in training:
            module.training = False
        for weight in trained:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in trained:
                weight.requires_grad_(True)
            for module in training:
                module.training = True

    def autocast(self) -> Any:
        """What the drafter's forward has to run in: its weights are float32."""
        if not self._autocasts:
            return nullcontext()
        return torch.autocast(self.model.device.type, torch.bfloat16)


def _is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _require_no_prompt_learning(model: Any) -> None:
    for adapter in (model.peft_config if _is_peft(model) else {}).values():
        if getattr(adapter, "is_prompt_learning", False):
            raise TrainingInputError(
                f"co_train: the model has an adapter of {adapter.peft_type.value}, "
                "whose tokens stand in no text, so a drafter cannot follow them; use "
                "LoRA, or train the whole model"
            )


def _require_followed(trainer: Any) -> None:
    """Refuse what a drafter cannot go along with."""
    parallel = trainer.accelerator.parallelism_config
    parts = {
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "tensor parallelism": parallel is not None and parallel.tp_enabled,
        "context parallelism": parallel is not None and parallel.cp_enabled,
        "sequence parallelism": parallel is not None and parallel.sp_enabled,
        "several GPUs in one process": trainer.args.n_gpu > 1,
    }
    if names := [name for name, is_on in parts.items() if is_on]:
        raise TrainingInputError(
            f"co_train: the trainer uses {names[0]}, by which no process has the whole "
            "model and whole texts; start one process per GPU without it (`accelerate "
            "launch`), or train the drafter afterwards, with `vllm-mtp train`"
        )
    if trainer.args.fp16:
        raise TrainingInputError(
            "co_train: fp16 is on, in which gradients of the drafter overflow; use bf16"
        )
    if trainer.model_init is not None:
        raise TrainingInputError(
            "co_train: the trainer makes its model anew in train() (model_init), which "
            "a drafter cannot be bound to before; give it the model"
        )
    if trainer.args.load_best_model_at_end and trainer.args.save_only_model:
        raise TrainingInputError(
            "co_train: load_best_model_at_end needs the drafter of that checkpoint as "
            "well, which save_only_model leaves out; turn one of them off"
        )
