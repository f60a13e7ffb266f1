# SPDX-License-Identifier: Apache-2.0
"""The targets and drafters of the matrix."""

import json
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny_targets import VOCAB_SIZE, make_tiny_llama
from tests.tiny_tokenizer import THINK_END_ID, THINK_ID, save_tiny_tokenizer
from vllm_mtp.drafter.checkpoint import save_drafter
from vllm_mtp.installed import installed_folder
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter

MAX_MODEL_LEN = 256
NUM_PROMPTS = 32
MAX_TOKENS = 24
# Around the ends of cache blocks of 32 and 64 tokens, and far from them.
LENGTHS = (
    *(3, 17, 31, 32, 33, 63, 64, 65, 95, 96, 100, 128, 1, 40, 150, 200),
    *(15, 16, 47, 48, 49, 80, 112, 127, 129, 160, 2, 7, 22, 75, 180, 33),
)

Prompts = list[list[int]]


@dataclass(frozen=True)
class Subject:
    """A target with one drafter, and what it is asked.

    Attributes:
        name: As docs/lossless.md shows it.
        target: The target's folder.
        spec: The drafter's ``speculative_config``.
        stream: Token ids that prompts are cut from, by the prompt's name.
        exact: The drafter's first token is the target's, always.
        least_accepted: Part of its first tokens that is accepted in every row.
        num_draft_tokens: k of the drafter.
        num_prompts: Prompts per row.
        max_tokens: Tokens per answer, where a row does not say.
        lengths: Tokens per prompt, where a row does not say.
        crowd_lengths: Tokens per prompt of a crowd that few blocks cannot hold.
        crowd_tokens: Tokens per answer there.
        few_blocks: How many cache blocks are few.
        spares: Facts that no row needs to show with this subject.
        without: Engines of `rows.ENGINES` that it cannot have, and why.
        tie_margin: Largest logprob gap of a float tie, in nats; 0 accepts none.
        settings: vLLM settings of every engine.
        block_sizes: Of the KV-cache groups, ascending, with blocks of 32 tokens.
    """

    name: str
    target: Path
    spec: dict[str, Any]
    stream: Callable[[str, int], list[int]]
    exact: bool = False
    least_accepted: float = 0.0
    num_draft_tokens: int = 4
    num_prompts: int = NUM_PROMPTS
    max_tokens: int = MAX_TOKENS
    lengths: Sequence[int] = LENGTHS
    crowd_lengths: Sequence[int] = (90, 100, 110, 95, 105, 120)
    crowd_tokens: int = 70
    few_blocks: int = 21
    spares: Collection[str] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    tie_margin: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    block_sizes: tuple[int, ...] = (32,)

    def prompts(self, name: str, lengths: Sequence[int] = ()) -> Prompts:
        """`num_prompts` prompts of the given lengths, over and over; the same ones
        for the same name."""
        wanted = lengths or self.lengths
        return [
            self.stream(f"{name} {number}", wanted[number % len(wanted)])
            for number in range(self.num_prompts)
        ]


def random_stream(name: str, length: int) -> list[int]:
    """Tokens that follow no rule."""
    rng = random.Random(name)
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


def text_stream(texts: Sequence[Sequence[int]]) -> Callable[[str, int], list[int]]:
    """Pieces of real text: one of the texts, and those behind it as far as needed."""

    def stream(name: str, length: int) -> list[int]:
        number = random.Random(name).randrange(len(texts))
        tokens: list[int] = []
        while len(tokens) < length:
            tokens += texts[number % len(texts)]
            number += 1
        return tokens[:length]

    return stream


def shorter_for_v2(subject: Subject) -> Subject:
    """The same with fewer and shorter requests: Triton's interpreter takes about 0.2 s
    per step."""
    return replace(
        subject,
        num_prompts=4,
        max_tokens=8,
        lengths=(3, 33, 64, 100),
        crowd_lengths=(110, 100, 95, 105),
        crowd_tokens=60,
        spares=(*subject.spares, "preempted_twice"),
    )


# How much of its layers' output a tiny chain keeps: with all of it, no later token can
# be guessed; with none, every token follows from the one before, and no cache matters.
_CHAIN = 0.002
_OFTEN = 1.4
_SURE = 20.0  # of which the sigmoid is 1


def tiny_chain_subject(folder: Path) -> Subject:
    """A tiny Llama whose drafter is right at the first position, and often later.

    The next token mostly follows from the last one; the rest of the text decides where
    two are about as good. The drafter is the target at the first position, and its
    Markov correction knows what follows from what. Both are made in ``folder``.
    """
    target = make_speaker(make_tiny_llama(folder / "target"))
    file = target / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(_CHAIN)
    head = weights["lm_head.weight"]
    head[[THINK_ID, THINK_END_ID]] *= _OFTEN
    save_file(weights, file, metadata={"format": "pt"})
    options = DrafterOptions(dtype="float32", markov_rank=head.shape[1])
    drafter = new_drafter(target, "shared:all", 4, options)
    assert drafter.markov is not None
    tokens = weights["model.embed_tokens.weight"]
    tokens = tokens * tokens.square().mean(dim=-1, keepdim=True).rsqrt()
    with torch.no_grad():
        drafter.markov.embed.weight.copy_(tokens * weights["model.norm.weight"])
        drafter.markov.gate.weight.zero_()
        drafter.markov.gate.bias.fill_(_SURE)
        drafter.markov.unembed.weight.copy_(3 * head)  # more than the position's own
    spec = {
        "method": "mtp_placeholder",
        "model": str(save_drafter(drafter, folder / "drafter")),
    }
    # vLLM puts a block that accepted drafts fill into the prefix cache a step later.
    return Subject(
        "tiny", target, spec, random_stream, exact=True, spares=("same_hits",)
    )


def smollm2_subject() -> Subject:
    """The demo target in float32 on real prompts, with the drafter `shared`."""
    from transformers import AutoTokenizer

    from vllm_mtp.data.demo_target import ensure_demo_target
    from vllm_mtp.data.sharegpt import sharegpt_prompts

    target = ensure_demo_target()
    tokenizer = AutoTokenizer.from_pretrained(target)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for text in sharegpt_prompts(64)
    ]
    return Subject(
        "SmolLM2",
        target,
        {"method": "mtp_placeholder", "model": str(installed_folder("shared"))},
        text_stream(texts),
        # A step takes a hundred times longer than a tiny target's.
        num_prompts=8,
        max_tokens=16,
        spares=("preempted_twice",),
        without=dict.fromkeys(
            ("thinking", "thinking, ahead"), "its tokenizer has no tokens for thinking"
        ),
        settings={"kv_cache_memory_bytes": 1 << 30},
    )


def make_speaker(target: Path) -> Path:
    """Give a tiny target a tokenizer, and many tokens that end an answer."""
    save_tiny_tokenizer(target)
    # One token in 16, so that answers end at any position of a draft.
    ends = {"eos_token_id": list(range(0, VOCAB_SIZE, 16))}
    (target / "generation_config.json").write_text(json.dumps(ends), "utf-8")
    return target
