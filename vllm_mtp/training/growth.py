# SPDX-License-Identifier: Apache-2.0
"""Start a drafter from a trained one: fewer layers, or more positions."""

from collections import defaultdict
from pathlib import Path

import torch

from vllm_mtp.drafter.checkpoint import load_drafter
from vllm_mtp.drafter.config import LayerConfig
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.training.states import TrainingInputError

_TOKENS = "draft_vocab.token_ids"
_ROWS_BY_TOKEN = "markov.unembed.weight"  # shape: [output tokens, rank]


@torch.no_grad()
def warm_start(drafter: Drafter, source: Drafter) -> list[str]:
    """Take over every weight of ``source`` that fits.

    Layers fit by kind and target layer, in the order they come, so layers can be
    left out ("healing"). Placeholders are taken from the first on; added ones go
    round the trained ones again (looped extension, MTP-D, 2603.23911). What the Markov
    correction has for a token that can be drafted is found by the token, so the
    vocabularies may differ; that of ``drafter`` stays.

    Args:
        drafter: Changed in place.
        source: Made for the same target.

    Returns:
        Names of the drafter's tensors that were not taken over.

    Raises:
        TrainingInputError: Nothing fits.
    """
    source.config.target.require_same(drafter.config.target)
    _require_same_lora_scale(drafter, source)
    taken = _layers_taken(drafter, source)
    weights = source.state_dict()
    left: list[str] = []
    # Noise is the target's own, as the vocabulary is this drafter's.
    kept = {_TOKENS, "placeholders"} if drafter.config.noise else {_TOKENS}
    ours = {n: t for n, t in drafter.state_dict().items() if n not in kept}
    for name, tensor in ours.items():
        origin = weights.get(_name_in_source(name, taken))
        if name == _ROWS_BY_TOKEN and origin is not None:
            origin = _rows_of_tokens(tensor, drafter, origin, source)
        if name == "placeholders" and origin is not None:
            rows = torch.arange(len(tensor)) % len(origin)
            tensor.copy_(origin[rows])
        elif origin is not None and origin.shape == tensor.shape:
            tensor.copy_(origin)
        else:
            left.append(name)
    if len(left) == len(ours):
        raise TrainingInputError(
            "warm_start: no weight of that drafter fits this one's layers; it has "
            f"{[getattr(x, 'target_layer', x.kind) for x in source.config.layers]} of "
            "target layers. Use another drafter, or none"
        )
    return left


def draft_tokens(folder: str | Path) -> tuple[int, ...] | None:
    """The reduced vocabulary of a drafter; None where it drafts every token."""
    vocab = load_drafter(Path(folder), dtype=torch.float32).draft_vocab
    return None if vocab is None else tuple(vocab.token_ids.tolist())


def _rows_of_tokens(
    rows: torch.Tensor, drafter: Drafter, origin: torch.Tensor, source: Drafter
) -> torch.Tensor:
    """Rows ``[V, rank]`` for the drafter's tokens, from those that ``source`` has.

    A token that ``source`` could not draft keeps its start value, which is no
    correction.
    """
    if rows.shape[1] != origin.shape[1]:
        return origin
    by_token = rows.new_zeros(drafter.config.target.vocab_size, rows.shape[1])
    by_token[_drafted(drafter)] = rows
    by_token[_drafted(source)] = origin
    return by_token[_drafted(drafter)]


def _drafted(drafter: Drafter) -> torch.Tensor | slice:
    """Where the drafter's output tokens stand in the target's vocabulary."""
    vocab = drafter.draft_vocab
    return slice(None) if vocab is None else vocab.token_ids


def _require_same_lora_scale(drafter: Drafter, source: Drafter) -> None:
    """The scale is no weight: taken over pairs would mean something else."""
    for index, origin in _layers_taken(drafter, source).items():
        ours, theirs = (
            getattr(d.config.layers[i], "lora", None)
            for d, i in ((drafter, index), (source, origin))
        )
        if ours and theirs and ours.alpha / ours.rank != theirs.alpha / theirs.rank:
            raise TrainingInputError(
                f"lora_alpha: got {ours.alpha} at rank {ours.rank}, but warm_start has "
                f"{theirs.alpha} at rank {theirs.rank}; keep alpha / rank as it is"
            )


def require_same_but_positions(drafter: Drafter, source: Drafter) -> None:
    """Raise unless the drafters differ in the number of positions alone.

    Raises:
        TrainingInputError: Names the settings that differ.
    """
    ours, theirs = (d.config.model_dump(mode="json") for d in (drafter, source))
    free = ("num_speculative_tokens", "dtype", "target")
    if wrong := [k for k in ours if k not in free and ours[k] != theirs[k]]:
        raise TrainingInputError(
            f"train_only: new_positions keeps everything but the new positions, yet "
            f"{', '.join(wrong)} differ from warm_start; describe the drafter as it is"
        )


def _layers_taken(drafter: Drafter, source: Drafter) -> dict[int, int]:
    """Layer number in the drafter to layer number in the source."""

    def alike(layer: LayerConfig) -> tuple[str, int | None]:
        return layer.kind, getattr(layer, "target_layer", None)

    positions: dict[tuple[str, int | None], list[int]] = defaultdict(list)
    for index, layer in enumerate(source.config.layers):
        positions[alike(layer)].append(index)
    taken: dict[int, int] = {}
    for index, layer in enumerate(drafter.config.layers):
        if queue := positions[alike(layer)]:
            taken[index] = queue.pop(0)
    return taken


def _name_in_source(name: str, taken: dict[int, int]) -> str:
    if not name.startswith("layers."):
        return name
    _, index, rest = name.split(".", 2)
    origin = taken.get(int(index))
    return "" if origin is None else f"layers.{origin}.{rest}"


def freeze_all_but_new_positions(
    drafter: Drafter, num_old: int, num_taught: int | None = None
) -> None:
    """Train the placeholders behind the first ``num_old`` positions alone.

    Args:
        drafter: The drafter.
        num_old: Positions that it had before.
        num_taught: Positions that are taught; None for all.

    Rows of a causal block do not read later ones, so the first positions draft
    exactly what they drafted before.

    Raises:
        TrainingInputError: There is no new position, or none is taught.
    """
    drafter.requires_grad_(False)
    if drafter.placeholders is None or len(drafter.placeholders) < num_old:
        raise TrainingInputError(
            f"train_only: new_positions, but num_speculative_tokens "
            f"({drafter.config.num_speculative_tokens}) adds no position to the "
            f"{num_old} of warm_start; ask for more"
        )
    if num_taught is not None and num_taught <= num_old:
        raise TrainingInputError(
            f"train_places: got {num_taught}, but train_only: new_positions trains "
            f"those behind the {num_old} of warm_start alone; write {num_old + 1} or "
            "more, or leave it out"
        )
    drafter.placeholders.requires_grad_(True)
    mask = torch.ones_like(drafter.placeholders)
    mask[: num_old - 1] = 0.0  # the first position is the anchor's
    drafter.placeholders.register_hook(lambda gradient: gradient * mask)
