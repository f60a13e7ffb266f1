# SPDX-License-Identifier: Apache-2.0
"""Between a PEFT adapter that drafts as Uno does and a drafter of ours.

Uno (arXiv 2609.04010): a draft is a seed row, which is the token just sampled on the
base weights, and noise rows, which are random tokens through base weights and LoRA; all
attend causally and read the target's own KV cache. That is our drafter ``shared:all``
with LoRA on its placeholders, whose placeholders are the embeddings of noise tokens.
One thing differs: Uno's engines draw other tokens for every draft, and a drafter of
ours keeps those that its config names.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from pydantic import ValidationError

from vllm_mtp.drafter.config import (
    DrafterConfig,
    LinearName,
    LoRAConfig,
    NoiseConfig,
    SharedLayerConfig,
)
from vllm_mtp.drafter.layers import SharedLayer
from vllm_mtp.drafter.lora import LowRankPair, linear_sizes
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.drafter.target_facts import TargetFacts, hf_config_of
from vllm_mtp.errors import MTPError, refusal_of
from vllm_mtp.sharing.peft_folder import Adapter, AdapterConfig, AdapterError, Pair
from vllm_mtp.torch_host.linear_modules import LinearModules, linear_modules
from vllm_mtp.torch_host.new_drafter import TargetWeights

_NAMES: tuple[LinearName, ...] = get_args(LinearName)


def drafter_of_adapter(
    adapter: Adapter, target: Path, num_speculative_tokens: int, noise: NoiseConfig
) -> Drafter:
    """Make the drafter that drafts with an adapter.

    Args:
        adapter: As its folder has it.
        target: The target's folder; its layers are looked at, and only the embeddings
            of the noise tokens are read.
        num_speculative_tokens: K of Uno: the seed row and K - 1 noise rows.
        noise: Tokens of the noise rows.

    Raises:
        AdapterError: The adapter is no LoRA on this target's layers, or one that a
            drafter cannot have.
        MTPError: The number of tokens or the noise is out of its limits.
    """
    facts = TargetFacts.from_folder(target)
    hf_config = hf_config_of(target)
    pairs = _by_layer(adapter, linear_modules(hf_config), facts)
    dtype = next(iter(adapter.pairs.values())).a.dtype
    try:
        config = DrafterConfig(
            model_type="mtp_placeholder",
            format_version=1,
            num_speculative_tokens=num_speculative_tokens,
            layers=tuple(
                SharedLayerConfig(
                    target_layer=index,
                    lora=_lora_config(adapter.config, index, pairs.get(index, {})),
                )
                for index in range(facts.num_hidden_layers)
            ),
            noise=noise,
            dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
            target=facts,
        )
    except ValidationError as error:
        raise MTPError(refusal_of(error)) from None
    drafter = Drafter(config).to(dtype)
    rows = TargetWeights(target, facts).embeddings(noise.token_ids, hf_config)
    with torch.no_grad():
        assert drafter.placeholders is not None, "noise has a token at least"
        drafter.placeholders.copy_(rows)
        for index, name, ours in _pairs_of(drafter):
            ours.a.copy_(pairs[index][name].pair.a)
            ours.b.copy_(pairs[index][name].pair.b)
    return drafter.eval().requires_grad_(False)


class _Found(NamedTuple):
    """A pair of an adapter, and where it stands."""

    path: str  # in the model that it was trained in
    pair: Pair


_Layer = Mapping[LinearName, _Found]


def _by_layer(
    adapter: Adapter, target: LinearModules, facts: TargetFacts
) -> Mapping[int, _Layer]:
    """The adapter's pairs by layer and module, each where the target has a module.

    Raises:
        AdapterError: A pair is missing, is left over, or has other sizes.
    """
    root = _root_of(adapter.pairs)
    modules = {
        f"{root}layers.{module.layer}.{module.path}": module
        for module in target.modules
    }
    found = set(adapter.pairs)
    wanted = {path for path in modules if is_targeted(adapter.config, path)}
    for problem, paths in (
        ("the target has no such linear module", found - set(modules)),
        ("target_modules does not name it", found & set(modules) - wanted),
        ("target_modules names it, but it has no pair", wanted - found),
    ):
        if paths:
            raise AdapterError(f"{_some(paths)}: {problem}; {_ADVICE}")
    layers: dict[int, dict[LinearName, _Found]] = {}
    for path, pair in adapter.pairs.items():
        module = modules[path]
        name = module.path.rpartition(".")[2]
        if name not in _NAMES:
            raise AdapterError(
                f"{path}: LoRA of a drafter stands on {', '.join(_NAMES)} alone, so "
                "this adapter cannot become one"
            )
        same = [
            other.path
            for other in target.modules
            if other.layer == module.layer and other.path.rpartition(".")[2] == name
        ]
        sizes = linear_sizes(facts.of_layer(module.layer), name)
        got = pair.a.shape[1], pair.b.shape[0]
        if len(same) > 1 or not module.sizes == sizes == got:
            raise AdapterError(
                f"{path}: its pair has (inputs, outputs) {got}, the target's module "
                f"{module.sizes}, and a drafter's LoRA {sizes} on the one module "
                f"{name} of a layer (here: {', '.join(same)}); {_ADVICE}"
            )
        layers.setdefault(module.layer, {})[name] = _Found(path, pair)
    return layers


_ADVICE = "use the target that the adapter was trained for"


def _some(paths: Iterable[str]) -> str:
    first, *rest = sorted(paths)
    return first + (f" and {len(rest)} more" if rest else "")


def _root_of(paths: Iterable[str]) -> str:
    """What stands before ``layers.N`` in all of them."""
    roots = set()
    for path in paths:
        match = re.match(r"(?P<root>(?:.*?\.)?)layers\.\d+\.", path)
        if match is None:
            raise AdapterError(
                f"{path}: a pair outside of the decoder layers, where a drafter's LoRA "
                "has none"
            )
        roots.add(match["root"])
    if len(roots) > 1:
        raise AdapterError(
            f"its pairs stand in several parts of a model: {', '.join(sorted(roots))}; "
            "a drafter's LoRA stands in the text part alone"
        )
    return roots.pop()


def is_targeted(config: AdapterConfig, path: str) -> bool:
    """Whether peft puts a pair on a linear module.

    As ``check_target_module_exists`` in ``peft/tuners/tuners_utils.py`` decides it.

    Args:
        config: The adapter's.
        path: Of the module, in the whole model.
    """
    if _names(config.exclude_modules or (), path):
        return False
    targets = config.target_modules
    if not isinstance(targets, str):
        if path in targets:
            return True
        return _names(targets, path) and _in_chosen_layers(config, path)
    return targets.lower() == "all-linear" or _names(targets, path)


def _names(patterns: Sequence[str] | str, path: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(path == end or path.endswith(f".{end}") for end in patterns)


def _in_chosen_layers(config: AdapterConfig, path: str) -> bool:
    chosen = config.layers_to_transform
    if chosen is None or chosen == ():
        return True
    lists = config.layers_pattern or (r"[^.]*",)
    lists = (lists,) if isinstance(lists, str) else lists
    matches = (re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", path) for name in lists)
    match = next((m for m in matches if m), None)
    if match is None:
        return False
    return int(match[1]) in ((chosen,) if isinstance(chosen, int) else chosen)


def _of_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """Of the first key that the path ends with, as ``get_pattern_key`` in
    ``peft/utils/other.py`` finds it."""
    keys = (key for key in patterns if re.match(rf"(.*\.)?({key})$", path))
    return patterns.get(next(keys, ""), default)


def _lora_config(config: AdapterConfig, index: int, layer: _Layer) -> LoRAConfig | None:
    """The LoRA of a layer, which has one rank and one scale.

    Raises:
        AdapterError: Its modules differ in them.
    """
    if not layer:
        return None
    ranks, alphas = set(), set()
    for path, pair in layer.values():
        rank = _of_pattern(config.rank_pattern, path, config.r)
        if got := [n for n in (pair.a.shape[0], pair.b.shape[1]) if n != rank]:
            raise AdapterError(
                f"{path}: r: its pair has rank {got[0]}, the adapter's config says "
                f"{rank}; config and weights must be of one adapter"
            )
        alpha = _of_pattern(config.alpha_pattern, path, config.lora_alpha)
        ranks.add(rank)
        # rsLoRA divides by the root of the rank, a drafter by the rank.
        alphas.add(alpha * math.sqrt(rank) if config.use_rslora else float(alpha))
    if len(ranks) > 1 or len(alphas) > 1:
        name, values = (
            ("rank_pattern", ranks) if len(ranks) > 1 else ("alpha_pattern", alphas)
        )
        raise AdapterError(
            f"{name}: the modules of layer {index} have {sorted(values)}, but LoRA of "
            "a drafter's layer has one value for all of them"
        )
    modules = tuple(name for name in _NAMES if name in layer)
    return LoRAConfig(rank=ranks.pop(), alpha=alphas.pop(), modules=modules)


def _pairs_of(drafter: Drafter) -> Iterable[tuple[int, LinearName, LowRankPair]]:
    """Target layer, module and weights of each pair."""
    for layer in drafter.layers:
        assert isinstance(layer, SharedLayer), "the target's own layers alone"
        for name, pair in layer.lora.items():
            yield layer.target_layer, name, pair  # type: ignore[misc]


def adapter_of_drafter(
    drafter: Drafter, target: Path, base: str
) -> tuple[dict[str, Any], dict[str, Pair], NoiseConfig]:
    """What a PEFT folder holds of a drafter; see `peft_folder.write_adapter`.

    Args:
        drafter: Of this target.
        target: The target's folder.
        base: Its name, as the adapter shall tell it.

    Raises:
        AdapterError: The drafter has what no adapter can say; names each.
        TargetMismatchError: It was made for another target.
    """
    config = drafter.config
    config.target.require_same(TargetFacts.from_folder(target))
    if problems := _not_in_peft(config):
        raise AdapterError(
            "a PEFT adapter cannot say this drafter: " + "; ".join(problems)
        )
    assert config.noise is not None, "refused above"
    at = linear_modules(hf_config_of(target))
    path_of = {
        (module.layer, module.path.rpartition(".")[2]): (
            f"{at.root}layers.{module.layer}.{module.path}"
        )
        for module in at.modules
    }
    pairs: dict[str, Pair] = {}
    for index, name, ours in _pairs_of(drafter):
        if (index, name) not in path_of:
            raise AdapterError(
                f"layers.{index}.lora.modules: {name!r} is part of a merged module of "
                "this target in transformers, on which peft has one pair for all parts"
            )
        pairs[path_of[index, name]] = Pair(ours.a.detach(), ours.b.detach())
    return _peft_config(config, at, path_of, base), pairs, config.noise


_AS_UNO: tuple[tuple[str, Any, str], ...] = (
    ("chain", None, "its positions run one after the other"),
    ("input", "block", "a hidden state enters it, and no tokens"),
    ("block_mask", "causal", "its rows read rows behind them"),
    ("lm_head", "target", "it has LM heads of its own"),
    ("extra_rows", 0, "it has trained rows between anchor and noise"),
)
"""Keys of a drafter, what they are where an adapter's engine can draft, and why another
value is more than an adapter."""


def _not_in_peft(config: DrafterConfig) -> list[str]:
    problems = []
    if own := [i for i, c in enumerate(config.layers) if c.kind != "shared"]:
        problems.append(f"layers {own} are its own (an adapter changes the target's)")
    elif not config.shares_whole_target:
        problems.append(
            "layers: it does not run every layer of the target, in order (an adapter's "
            "engine does)"
        )
    changed = [i for i, c in enumerate(config.layers) if getattr(c, "full_rank", ())]
    if changed:
        problems.append(f"layers {changed}: full_rank: no change of low rank")
    for key, plain, why in _AS_UNO:
        if getattr(config, key) != plain:
            problems.append(f"{key}: {why}")
    if config.noise is None and config.num_placeholders:
        problems.append(
            "its placeholders are trained vectors (an adapter's engine feeds noise "
            "tokens: train with placeholder_kind: noise)"
        )
    elif config.noise is None:
        problems.append("it has no placeholders, where an engine feeds noise tokens")
    if not any(getattr(layer, "lora", None) for layer in config.layers):
        problems.append("it has no LoRA")
    if config.markov is not None:
        problems.append("markov: it corrects logits by the token drafted before")
    if config.draft_vocab_size is not None:
        problems.append("draft_vocab_size: it drafts over a reduced vocabulary")
    if config.prefix_window is not None:
        problems.append("prefix_window: it reads a part of the prefix")
    return problems


def _peft_config(
    config: DrafterConfig,
    at: LinearModules,
    path_of: Mapping[tuple[int, str], str],
    base: str,
) -> dict[str, Any]:
    """``adapter_config.json``: the commonest rank and scale, patterns for others."""
    loras = {
        path_of[layer.target_layer, name]: layer.lora
        for layer in config.layers
        if isinstance(layer, SharedLayerConfig) and layer.lora is not None
        for name in layer.lora.modules
    }
    rank = Counter(lora.rank for lora in loras.values()).most_common(1)[0][0]
    alpha = Counter(lora.alpha for lora in loras.values()).most_common(1)[0][0]
    named = {path.rpartition(".")[2] for path in loras}
    # By their ends where these name the same modules, as engines like it best.
    ends = {path for (_, name), path in path_of.items() if name in named}
    short = ends == set(loras) and not named & at.elsewhere
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "target_modules": sorted(named if short else loras),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "rank_pattern": {
            path: lora.rank for path, lora in loras.items() if lora.rank != rank
        },
        "alpha_pattern": {
            path: _plain(lora.alpha)
            for path, lora in loras.items()
            if lora.alpha != alpha
        },
    }


def _plain(alpha: float) -> float:
    """As an integer where it is one: some engines take no other."""
    return int(alpha) if alpha == int(alpha) else alpha
