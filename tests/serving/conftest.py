# SPDX-License-Identifier: Apache-2.0
"""Targets and drafters for the engine tests."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoints_spec.goldens import fill_weights, fixed_values
from tests.tiny_targets import EMBEDDING_STD, make_tiny, make_tiny_w8a8
from tests.tiny_tokenizer import save_tiny_tokenizer
from vllm_mtp.drafter.checkpoint import save_drafter
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter

# Everything that can stand around a list of layers, at once.
ALL_OPTIONS = DrafterOptions(
    dtype="float32",
    boundary_hidden="all",
    bridges=True,
    markov_rank=8,
    draft_vocab_size=256,
    lora_rank=4,
    lora_modules=["q_proj", "o_proj", "gate_proj"],
)
PLAIN = DrafterOptions(dtype="float32")

# name: (layers, k, options)
DRAFTERS: dict[str, tuple[str, int, DrafterOptions]] = {
    "shared-1": ("shared:all", 1, PLAIN),
    "shared-4": ("shared:all", 4, PLAIN),
    "own-1": ("own:all", 1, PLAIN),
    "own-some": ("own:0,3", 3, PLAIN),
    "own-random": ("own:1,3", 3, DrafterOptions(dtype="float32", own_init="random")),
    "mixed": ("shared:0-1,own:2,3", 4, ALL_OPTIONS),
    # Both skip tokens from a prefix of 306 on.
    "windowed": ("shared:all", 4, replace(PLAIN, prefix_window=50)),
    "mixed-windowed": ("shared:0-1,own:2,3", 4, replace(ALL_OPTIONS, prefix_window=50)),
    "overflows": ("own:0,shared:1,own:3", 4, PLAIN),
    # Each kind of layer behind each, and at both ends.
    "own-shared": ("own:0,shared:1,2,own:3", 3, replace(PLAIN, own_init="random")),
    "shared-own": ("shared:0,own:1,2,shared:3", 3, replace(PLAIN, own_init="random")),
    # No layer of these two reads a cache.
    "heads": (
        "mlp:2",
        4,
        replace(
            PLAIN,
            input="boundary",
            lm_head="own",
            mlp_form="square",
            per_position=True,
            draft_vocab_size=256,
        ),
    ),
    "block": (
        "own:1,mlp:1,own:3",
        4,
        replace(PLAIN, own_attention="block", boundary_hidden="all", markov_rank=8),
    ),
    "bidirectional": (
        "shared:0-1,own:2,3",
        4,
        replace(PLAIN, block_mask="bidirectional"),
    ),
    "chain": ("shared:0-1,own:2,3", 4, replace(PLAIN, chain=True)),
    "chain-all": (
        "own:0,mlp:1,shared:2",
        4,
        replace(ALL_OPTIONS, chain=True, markov_rank=None, prefix_window=50),
    ),
    "position-layers": (
        "own:0,mlp:1,own:3",
        4,
        replace(PLAIN, per_position=True, boundary_hidden="first", bridges=True),
    ),
    "full-rank": (
        "shared:all",
        4,
        replace(PLAIN, full_rank_modules=["q_proj", "v_proj", "o_proj", "up_proj"]),
    ),
}
# Drafters of shapes that have come later: heads, chains, blocks of another mask, ...
SHAPES = (
    *("heads", "block", "bidirectional", "chain", "chain-all"),
    *("position-layers", "full-rank"),
)


class TinyTargets(dict[str, Path]):
    """Folders of tiny fp32 targets by family, each made when it is asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __missing__(self, family: str) -> Path:
        folder = self._root / family
        if family == "llama_w8a8":
            self[family] = make_tiny_w8a8(folder)
        else:
            self[family] = make_tiny(family, folder)
        if family == "glm_ocr":
            save_tiny_tokenizer(folder)  # vLLM asks for one, for its images
        return self[family]


@pytest.fixture(scope="session")
def tiny_targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny fp32 target of each family."""
    return TinyTargets(tmp_path_factory.mktemp("targets"))


@pytest.fixture(scope="session")
def tiny_drafter(
    tiny_targets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Folder of one of `DRAFTERS` for one family, made once."""
    root = tmp_path_factory.mktemp("drafters")

    def make(family: str, name: str) -> Path:
        folder = root / f"{family}-{name}"
        if not folder.exists():
            layers, k, options = DRAFTERS[name]
            tokens = range(0, 512, 2) if options.draft_vocab_size else None
            drafter = new_drafter(tiny_targets[family], layers, k, options, tokens)
            if options.lora_rank:
                stir(drafter)
            if name in ("own-shared", "shared-own"):
                fill_weights(drafter, 0.2)  # the start values of own layers do nothing
            if name == "overflows":
                blow_up(drafter)
            if name in SHAPES:
                vary(drafter)
            save_drafter(drafter, folder)
        return folder

    return make


def blow_up(drafter: Drafter) -> None:
    """Finite weights, of which the first forward makes infinity and NaN."""
    for name, weight in drafter.named_parameters():
        if name.endswith(("v_proj.weight", "down_proj.weight")):
            weight.data.mul_(1e38)


@torch.no_grad()
def vary(drafter: Drafter) -> None:
    """Change every weight a little: no two positions have the same, and none is zero.

    Rows of a chain begin with little but the token, like the target's. So a chain of
    all its layers is nearly the target, and many of its drafts are accepted."""
    if drafter.chain is not None:
        fuse = drafter.chain.fuse.weight
        fuse *= EMBEDDING_STD
        fuse[:, fuse.shape[0] :] *= 0.03
    for name, weight in drafter.named_parameters():
        some = 0.02 * float(weight.std(correction=0)) or 0.02
        weight += fixed_values(name, weight.shape, some)


def stir(drafter: Drafter) -> None:
    """Give the parts that start at zero some weight, so that they do something."""
    starts_at_zero = (".b", "unembed.weight", "boundary_proj.weight", "bridge.bias")
    for name, weight in drafter.named_parameters():
        if name.endswith(starts_at_zero):
            weight.data.normal_(std=0.05)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo target's folder."""
    from vllm_mtp.data.demo_target import ensure_demo_target

    return ensure_demo_target()


@pytest.fixture(scope="session")
def smollm2_prompts(smollm2: Path) -> list[list[int]]:
    """24 real prompts as token ids, from 30 to about 500 tokens."""
    from transformers import AutoTokenizer

    from vllm_mtp.data.sharegpt import sharegpt_prompts

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for text in sharegpt_prompts(24)
    ]
