# SPDX-License-Identifier: Apache-2.0
"""Start a drafter from a trained one: fewer layers, or more positions."""

from collections import defaultdict
from pathlib import Path

import torch

from vllm_mtp.drafter.checkpoint import load_drafter
from vllm_mtp.drafter.config import LayerConfig, OwnLayerConfig
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.training.states import TrainingInputError

_TOKENS = "draft_vocab.token_ids"
# Their last dimension but one is output tokens.
_ROWS_BY_TOKEN = ("markov.unembed.weight", "lm_heads.weight")
# Keys of own layers that add weights, or change their shape: the rest means the same.
_ADDING = {"intermediate_size", "boundary_hidden", "bridge", "per_position"}
# Keys that change what some weights are for; other keys concern the whole layer.
_CONCERNED = {
    "attention": (
        *("q_proj.", "k_proj.", "v_proj.", "o_proj.", "o_bias"),
        *("q_norm.", "k_norm.", "output_gate_proj."),
    ),
    "boundary_of": ("boundary_proj.",),
}


@torch.no_grad()
def warm_start(drafter: Drafter, source: Drafter) -> list[str]:
    """Take over every weight of ``source`` that fits and is for the same computation
    (`computed_otherwise`).

    Layers fit by kind and target layer, or form, in the order they come, so layers can
    be left out ("healing"). Placeholders and weights per position are taken from the
    first on; added positions go round the trained ones again, all but the first of
    them (looped extension, MTP-D, 2603.23911). Where the source has one weight for all
    positions, each begins with it. What the Markov correction and own LM heads have for
    a token that can be drafted is found by the token, so the vocabularies may differ;
    that of ``drafter`` stays.

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
    other = tuple(computed_otherwise(drafter, source))
    left: list[str] = []
    # Noise is the target's own, as the vocabulary is this drafter's.
    kept = {_TOKENS, "placeholders"} if drafter.config.noise else {_TOKENS}
    ours = {n: t for n, t in drafter.state_dict().items() if n not in kept}
    by_position, theirs = drafter.weights_by_position(), source.weights_by_position()
    for name, tensor in ours.items():
        name_there = _name_in_source(name, taken)
        origin = None if name.startswith(other) else weights.get(name_there)
        if origin is not None and name in by_position:
            if name_there in theirs:
                first = by_position[name]
                origin = origin[_positions_taken(len(tensor), len(origin), first)]
            else:
                origin = origin.expand(len(tensor), *origin.shape)
        if origin is not None and name in _ROWS_BY_TOKEN:
            origin = _rows_of_tokens(tensor, drafter, origin, source)
        if origin is not None and origin.shape == tensor.shape:
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


def computed_otherwise(drafter: Drafter, source: Drafter) -> dict[str, str]:
    """What of a drafter has weights of the same shape in ``source``, but for another
    computation: beginnings of tensors' names, and the key that differs."""
    found: dict[str, str] = {}
    layers, theirs = drafter.config.layers, source.config.layers
    mixes_differ = drafter.config.boundary_layers != source.config.boundary_layers
    if mixes_differ:
        found["boundary_mix"] = "boundary_layers"
    for index, origin in _layers_taken(drafter, source).items():
        layer, there = layers[index], theirs[origin]
        if not isinstance(layer, OwnLayerConfig):
            continue
        for key, value in layer.model_dump().items():
            if key in _ADDING or value == getattr(there, key):
                continue
            for name in _CONCERNED.get(key, ("",)):
                found[f"layers.{index}.{name}"] = key
        if mixes_differ and layer.boundary_of == "last":
            found[f"layers.{index}.boundary_proj."] = "boundary_layers"
    return found


def _positions_taken(num_ours: int, num_theirs: int, first: int) -> torch.Tensor:
    """Which entry of the source each of ours begins as.

    All tensors of a position are taken from the same one. The first position is the
    anchor's, or a head's of the next token, so added ones begin as no such.
    """
    ours = torch.arange(num_ours)
    start = min(1 - first, num_theirs - 1)
    round_again = start + (ours - start) % (num_theirs - start)
    return torch.where(ours < num_theirs, ours, round_again)


def draft_tokens(folder: str | Path) -> tuple[int, ...] | None:
    """The reduced vocabulary of a drafter; None where it drafts every token."""
    vocab = load_drafter(Path(folder), dtype=torch.float32).draft_vocab
    return None if vocab is None else tuple(vocab.token_ids.tolist())


def _rows_of_tokens(
    rows: torch.Tensor, drafter: Drafter, origin: torch.Tensor, source: Drafter
) -> torch.Tensor:
    """Rows ``[.., V, size]`` for the drafter's tokens, from those that ``source`` has.

    A token that ``source`` could not draft keeps its start value: no correction, or
    the target's own row.
    """
    if rows.shape[-1] != origin.shape[-1] or rows.shape[:-2] != origin.shape[:-2]:
        return origin
    where = torch.full((drafter.config.target.vocab_size,), -1)
    where[_drafted(source)] = torch.arange(origin.shape[-2])
    where = where[_drafted(drafter)]
    known, found = where >= 0, rows.clone()
    found[..., known, :] = origin[..., where[known], :].to(rows.dtype)
    return found


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

    def alike(layer: LayerConfig) -> tuple[str, int | str | None]:
        form = getattr(layer, "form", None)  # what MLP layers' weights are for
        return layer.kind, getattr(layer, "target_layer", form)

    positions: dict[tuple[str, int | str | None], list[int]] = defaultdict(list)
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
    """Train alone what belongs to the positions behind the first ``num_old``: their
    placeholders, and their weights where each position has some.

    Args:
        drafter: The drafter.
        num_old: Positions that it had before.
        num_taught: Positions that are taught; None for all.

    Rows of a causal block do not read later ones, so the first positions draft
    exactly what they drafted before.

    Raises:
        TrainingInputError: There is no new position, none is taught, or the drafter has
            nothing of a position's own.
    """
    config = drafter.config
    by_position = drafter.weights_by_position()
    if config.num_speculative_tokens <= num_old:
        raise TrainingInputError(
            f"train_only: new_positions, but num_speculative_tokens "
            f"({config.num_speculative_tokens}) adds no position to the "
            f"{num_old} of warm_start; ask for more"
        )
    if not by_position:
        raise TrainingInputError(
            "train_only: new_positions, but this drafter has neither placeholders nor "
            "weights per position: all of it is of every position; train all"
        )
    if config.block_mask != "causal":
        raise TrainingInputError(
            "train_only: new_positions keeps what the first positions draft, but with "
            f"block_mask {config.block_mask!r} they read the new ones; train all"
        )
    if num_taught is not None and num_taught <= num_old:
        raise TrainingInputError(
            f"train_places: got {num_taught}, but train_only: new_positions trains "
            f"those behind the {num_old} of warm_start alone; write {num_old + 1} or "
            "more, or leave it out"
        )
    train_by_position(drafter)
    for name, first in by_position.items():
        if (weight := drafter.get_parameter(name)).requires_grad:
            _mask_gradient(weight, num_old - first)


def train_by_position(drafter: Drafter) -> None:
    """Train what belongs to single positions, and nothing else."""
    drafter.requires_grad_(False)
    for name in drafter.weights_by_position():
        # The target's own embeddings are not trained.
        if name != "placeholders" or drafter.config.noise is None:
            drafter.get_parameter(name).requires_grad_(True)


def _mask_gradient(weight: torch.nn.Parameter, num_kept: int) -> None:
    def masked(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[:num_kept] = 0.0
        return gradient

    weight.register_hook(masked)
