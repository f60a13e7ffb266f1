# SPDX-License-Identifier: Apache-2.0
"""The frozen target's states of the training texts, kept in memory while they fit.

Nothing is dumped on disk unless it is asked for (`states_folder`): hidden states and
keys of a corpus take far more room than the corpus, and the target is at hand.
"""

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

import torch

from vllm_mtp.errors import MTPError
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.target_states import TargetStates
from vllm_mtp.training.states_folder import StatesFolder


class TrainingInputError(MTPError):
    """What the target gave cannot be learnt from."""


class StatesSource:
    """Gives a text's target states, computed once if they fit.

    What was kept first stays. Each epoch has an order of its own, so the text that was
    read last is the one that comes again last: to keep it in place of another would
    find fewer texts again, not more (with room for half of them, one in eight where the
    oldest makes room, and one in two so).

    Args:
        host: The target.
        cached_layers: Layers whose keys and values the drafter reads.
        streams: Layers whose output is wanted too.
        budget_bytes: Memory for keeping states; 0 computes them every time.
        folder: Where they are kept from run to run; None for nowhere.
    """

    def __init__(
        self,
        host: HFTarget,
        cached_layers: Collection[int],
        streams: Collection[int] = (),
        budget_bytes: float = 0,
        folder: Path | None = None,
    ) -> None:
        self._host = host
        self._layers = cached_layers
        self._streams = streams
        self._room = budget_bytes
        self._folder = folder
        self._on_disk: StatesFolder | None = None
        self._kept: dict[int, TargetStates] = {}

    def get(self, key: int, token_ids: torch.Tensor) -> TargetStates:
        """States of one text.

        Args:
            key: The text's number; the same key must always be the same text.
            token_ids: ``[T]`` int64.

        Raises:
            TrainingInputError: Some state is all zero, constant or not finite.
        """
        if key in self._kept:
            return self._kept[key]
        states = self._states(token_ids)
        require_sane(states, key, token_ids)
        size = _num_bytes(states)
        if size <= self._room:
            self._room -= size
            self._kept[key] = states
        return states

    def _states(self, token_ids: torch.Tensor) -> TargetStates:
        if self._folder is None:
            return self._host.encode(
                token_ids, cached=self._layers, streams=self._streams
            )
        if self._on_disk is None:  # now it is known in which type they are computed
            self._on_disk = StatesFolder(self._folder, self._host)
        return self._on_disk.states(token_ids, self._layers, self._streams)


def require_sane(states: TargetStates, key: int, token_ids: torch.Tensor) -> None:
    """Refuse what a broken target, or a broken way of reading it, gives.

    Such states train smoothly, on nothing.

    Args:
        states: Of one text.
        key: Its number, for messages.
        token_ids: ``[T]`` int64. Where one token is repeated, what has no position in
            it is rightly the same everywhere.

    Raises:
        TrainingInputError: Names the tensor and what is wrong with it.
    """
    repeated = bool((token_ids == token_ids[:1]).all())
    for name, tensor in _tensors(states):
        if fault := _fault(tensor, repeated):
            raise TrainingInputError(
                f"text {key}: the target's {name} {fault}, shape "
                f"{list(tensor.shape)}. Training on this would learn nothing; check "
                "the target's weights and dtype (float16 overflows in some models)"
            )


def _fault(tensor: torch.Tensor, repeated: bool) -> str | None:
    low, high = tensor.min().item(), tensor.max().item()
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        return "holds values that are not finite"
    if low == high:
        return "is all zero" if low == 0 else f"is constant ({low})"
    if repeated:
        return None
    if tensor.shape[-2] > 1 and bool((tensor == tensor[..., :1, :]).all()):
        return "is the same for every token"
    return None


def _tensors(states: TargetStates) -> list[tuple[str, torch.Tensor]]:
    named = [("last hidden state", states.hidden)]
    for field in fields(states):
        if field.name != "hidden":
            per_layer: dict[int, torch.Tensor] = getattr(states, field.name)
            named += [(f"{field.name} of layer {i}", t) for i, t in per_layer.items()]
    return named


def _num_bytes(states: TargetStates) -> int:
    return sum(tensor.nbytes for _, tensor in _tensors(states))
