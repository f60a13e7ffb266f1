# SPDX-License-Identifier: Apache-2.0
"""The sizes of a training step, from a target's config and the settings alone."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.torch_host.load import decoder_of
from vllm_mtp.torch_host.texts import anchors_are_exact
from vllm_mtp.torch_host.without_weights import BareTarget, drafter_config
from vllm_mtp.training.arguments import DrafterTrainingArguments
from vllm_mtp.training.growth import train_by_position
from vllm_mtp.training.optimizer import make_optimizer


@dataclass(frozen=True)
class TargetSize:
    """A target's weights.

    Attributes:
        parameters: All of them.
        bytes: What they take when they are loaded for training.
        active_parameters: Those of the layers that one token goes through.
        kv_heads: Numbers of keys and values of a token, over all layers.
        attended: Query heads times their size, over all layers with attention.
        active_mlp: Width of the MLP that one token goes through in a layer.
        qk_norm: Whether queries and keys pass a norm.
    """

    parameters: int
    bytes: int
    active_parameters: int
    kv_heads: int
    attended: int
    active_mlp: int
    qk_norm: bool


@dataclass(frozen=True)
class StepShape:
    """What memory and time of a step on one device follow from.

    Attributes:
        config: The drafter's.
        target: The target's weights.
        args: The settings.
        texts: Of one forward.
        tokens: Of a text.
        blocks: Behind a text.
        drafter_parameters: All weights of the drafter.
        trained_parameters: Those with a gradient.
        optimizer_bytes: What the optimizer keeps between two steps.
    """

    config: DrafterConfig
    target: TargetSize
    args: DrafterTrainingArguments
    texts: int
    tokens: int
    blocks: int
    drafter_parameters: int
    trained_parameters: int
    optimizer_bytes: int

    @property
    def item(self) -> int:
        """Bytes of a number in the type that the target computes in."""
        return 2 if self.args.bf16 else 4

    @property
    def positions(self) -> int:
        """Positions of a block that are run; those that are exact are not."""
        taught = self.args.train_places or self.config.num_speculative_tokens
        return taught - (self.is_exact and taught > 1)

    @property
    def is_exact(self) -> bool:
        """Whether the anchors' rows are the target's own."""
        return anchors_are_exact(self.config)

    @property
    def scored(self) -> int:
        """Tokens that are scored in each row."""
        some = self.config.draft_vocab_size or self.args.loss_vocab_size
        return some or self.config.target.vocab_size

    @property
    def needs_teacher(self) -> bool:
        return self.args.kl_weight > 0 or self.args.tv_weight > 0

    def of_text(self, tokens: float, blocks: float) -> "StepShape":
        """The same with other texts."""
        most = min(self.args.anchors_per_text, blocks)
        return replace(
            self,
            tokens=round(min(tokens, self.args.max_text_tokens)),
            blocks=max(round(most), 1),
        )


def step_shape(
    target: BareTarget,
    args: DrafterTrainingArguments,
    known: Iterable[StepShape] = (),
) -> StepShape:
    """The step of the longest texts, each with as many blocks as it may have.

    Args:
        target: The target.
        args: The settings.
        known: Steps of the same target and optimizer; where the drafter is one of
            theirs, nothing is counted anew.

    Raises:
        MTPError: The target or the settings do not go.
    """
    config = drafter_config(target, args.layers, args.num_speculative_tokens, args)
    most: dict[str, Any] = {
        "args": args,
        "texts": args.per_device_train_batch_size,
        "tokens": args.max_text_tokens,
        "blocks": min(args.anchors_per_text, args.max_text_tokens - 1),
    }
    for like in known:
        if (like.config, like.args.bf16) == (config, args.bf16):
            return replace(like, **most)
    drafter, trained, optimizer_bytes = _drafter_size(config, args)
    return StepShape(
        **most,
        config=config,
        target=_target_size(target, config, args),
        drafter_parameters=drafter,
        trained_parameters=trained,
        optimizer_bytes=optimizer_bytes,
    )


def _drafter_size(
    config: DrafterConfig, args: DrafterTrainingArguments
) -> tuple[int, int, int]:
    """Weights of the drafter, those that are trained, and bytes of the optimizer's
    states: the real one's, whose tensors have no storage."""
    holder = nn.Module()
    with FakeTensorMode(allow_non_fake_inputs=True):
        drafter = Drafter(config)
        if args.train_only == "new_positions":
            train_by_position(drafter)
    holder.drafter = drafter
    optimizer = make_optimizer(holder, args)
    alike: dict[Any, list[torch.Tensor]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for weight in group["params"]:
            alike.setdefault((number, weight.shape), []).append(weight)
    # One of each kind tells what the optimizer keeps for all of them.
    for weights in alike.values():
        weights[0].grad = torch.empty_like(weights[0])
    optimizer.step()
    states = 0
    for weights in alike.values():
        kept = optimizer.state[weights[0]].values()
        of_one = sum(v.nbytes for v in kept if isinstance(v, torch.Tensor))
        states += of_one * len(weights)
    trained = (weight for weights in alike.values() for weight in weights)
    numbers = (sum(p.numel() for p in ps) for ps in (drafter.parameters(), trained))
    return (*numbers, states)  # type: ignore[return-value]


def _target_size(
    target: BareTarget, config: DrafterConfig, args: DrafterTrainingArguments
) -> TargetSize:
    model, facts = target.model, config.target
    text = target.config.get_text_config()
    heads = [facts.of_layer(i) for i in range(facts.num_hidden_layers)]
    cached = facts.cached_layers or range(facts.num_hidden_layers)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(text, name, None))), 0)
    used = (getattr(text, "num_experts_per_tok", None) or 0) / (experts or 1)
    layers = dict(decoder_of(model).layers.named_parameters())
    active = sum(
        weight.numel() * (used if experts and ".experts." in f".{name}" else 1)
        for name, weight in layers.items()
    )
    attention = sum(w.numel() for n, w in layers.items() if "attn" in n)
    parameters = sum(p.numel() for p in model.parameters())
    return TargetSize(
        parameters=parameters,
        bytes=parameters * (2 if args.bf16 else 4),
        active_parameters=round(active),
        kv_heads=sum(
            2 * heads[i].num_key_value_heads * heads[i].head_dim for i in cached
        ),
        attended=sum(heads[i].num_attention_heads * heads[i].head_dim for i in cached),
        active_mlp=round(
            (active - attention) / (3 * facts.hidden_size * facts.num_hidden_layers)
        ),
        qk_norm=any("q_norm" in name for name in layers),
    )
