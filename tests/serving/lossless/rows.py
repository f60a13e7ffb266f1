# SPDX-License-Identifier: Apache-2.0
"""The rows of the matrix, as data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.sampling_params import StructuredOutputsParams

from tests.serving.lossless.plays import (
    Play,
    aborts,
    arrivals,
    ask,
    ask_lengths,
    batches,
    beams,
    embedded,
    mixed_sampling,
    near_the_limit,
    reset_in_between,
    turns,
    twice,
)


@dataclass(frozen=True)
class Engine:
    """Settings of the engines of some rows.

    Attributes:
        settings: vLLM's, for both sides.
        spec: More keys of ``speculative_config``.
        scheduled_ahead: With async scheduling, vLLM's default on GPUs.
    """

    settings: Mapping[str, Any]
    spec: Mapping[str, Any] | None = None
    scheduled_ahead: bool = False


_MANY = {"max_num_seqs": 64}
ENGINES = {
    "default": Engine(_MANY),
    "small budget": Engine({"max_num_seqs": 16, "max_num_batched_tokens": 64}),
    # Fewer blocks than the requests need.
    "few blocks": Engine({"max_num_seqs": 16, "num_gpu_blocks_override": 25}),
    "no prefix cache": Engine(_MANY | {"enable_prefix_caching": False}),
    "blocks of 64": Engine(_MANY | {"block_size": 64}),
    "fp8 cache": Engine(_MANY | {"kv_cache_dtype": "fp8"}),
    "embeddings": Engine(_MANY | {"enable_prompt_embeds": True}),
    "fewer tokens": Engine(_MANY, {"num_speculative_tokens": 2}),
    "tokens by batch": Engine(
        _MANY,
        {"num_speculative_tokens_per_batch_size": [(1, 2, 4), (3, 8, 2), (9, 64, 1)]},
    ),
    "probabilistic": Engine(_MANY, {"draft_sample_method": "probabilistic"}),
    "scheduled ahead": Engine(_MANY, scheduled_ahead=True),
    "ahead, few blocks": Engine(
        {"max_num_seqs": 16, "num_gpu_blocks_override": 25}, scheduled_ahead=True
    ),
}


@dataclass(frozen=True)
class Row:
    """One row: what an engine does, and what must have happened.

    Attributes:
        name: Short name, as docs/lossless.md shows it.
        play: What it does.
        engine: One of `ENGINES`.
        shows: Facts of both sides that must not be 0, as `matrix.Facts` has them.
        same_hits: The prefix cache must give as much on both sides.
        drafts: Whether the drafter is used at all.
        on_v2: Also for the V2 runner, of which a step takes long on a CPU.
    """

    name: str
    play: Play
    engine: str = "default"
    shows: tuple[str, ...] = ()
    same_hits: bool = False
    drafts: bool = True
    on_v2: bool = False


def _structured(**what: Any) -> Mapping[str, Any]:
    return {
        "structured_outputs": StructuredOutputsParams(**what),
        "ignore_eos": False,
        "max_tokens": 32,
    }


_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "bb", "ccc"]}},
    },
    "required": ["name", "age", "tags"],
}
_GRAMMAR = """root ::= term (("+" | "-") term)*
term ::= [0-9]+ | "(" root ")"
"""
_STOP_TOKENS = list(range(5, 512, 16))
_ONE = {"temperature": 1.0, "top_k": 1}

ROWS = (
    Row("one request at a time", batches(1)),
    Row("batches of 4, mixed lengths", batches(4), on_v2=True),
    Row("batches of 16, mixed lengths", batches(16)),
    Row("all at once, up to 64", ask("at once")),
    Row("requests come and go", arrivals, on_v2=True),
    Row(
        "prompts a second time",
        twice("twice"),
        shows=("prefix_hits",),
        same_hits=True,
        on_v2=True,
    ),
    Row("three turns", turns, shows=("prefix_hits",), same_hits=True),
    Row("prefix cache emptied", reset_in_between),
    Row("no prefix cache", ask("no prefix cache"), "no prefix cache"),
    Row(
        "prompts in pieces",
        ask("pieces"),
        "small budget",
        ("chunked", "mixed"),
        on_v2=True,
    ),
    Row(
        "prompts in pieces, twice", twice("pieces 2"), "small budget", ("prefix_hits",)
    ),
    Row(
        "preemption, some twice",
        ask_lengths("preempted", (90, 100, 110, 95, 105, 120), max_tokens=70),
        "few blocks",
        ("preemptions", "preempted_twice"),
    ),
    Row("one, some, all at max_model_len", near_the_limit),
    Row("cache blocks of 64", ask("blocks of 64"), "blocks of 64"),
    Row("fp8 KV cache", ask("fp8"), "fp8 cache"),
    Row("aborts at every stage", aborts, "small budget", ("chunked",), on_v2=True),
    Row(
        "EOS inside a draft", ask("eos", ignore_eos=False), shows=("ended",), on_v2=True
    ),
    Row("stop tokens", ask("stop", stop_token_ids=_STOP_TOKENS), shows=("ended",)),
    Row("stop strings", ask("strings", stop=["a", "ti", "e "]), shows=("ended",)),
    Row(
        "min_tokens",
        ask("min", ignore_eos=False, min_tokens=9, stop_token_ids=_STOP_TOKENS),
        shows=("ended",),
    ),
    Row("logprobs", ask("logprobs", logprobs=5), on_v2=True),
    Row("prompt logprobs", ask("prompt logprobs", prompt_logprobs=3, logprobs=2)),
    Row(
        "penalties",
        ask(
            "penalties",
            presence_penalty=0.5,
            frequency_penalty=0.7,
            repetition_penalty=1.2,
        ),
    ),
    Row("bad words", ask("bad words", bad_words=["a", "the", "ing"])),
    Row("allowed tokens", ask("allowed", allowed_token_ids=list(range(1, 400, 3)))),
    Row("sampled, top-k 1, n = 3", ask("n", n=3, seed=5, **_ONE)),
    Row("sampled, top-p near 0", ask("top-p", temperature=0.7, top_p=1e-6)),
    Row("greedy beside sampled", mixed_sampling),
    Row(
        "probabilistic drafts, top-k 1",
        ask("probabilistic", seed=1, **_ONE),
        "probabilistic",
    ),
    Row("JSON schema", ask("json", **_structured(json=_SCHEMA))),
    Row("regular expression", ask("regex", **_structured(regex=r"(\d{2,4}-)*[a-f]+"))),
    Row("grammar", ask("grammar", **_structured(grammar=_GRAMMAR))),
    Row("choice", ask("choice", **_structured(choice=["yes", "no", "perhaps"]))),
    Row("prompts as embeddings", embedded, "embeddings"),
    Row("beam search", beams, drafts=False),
    Row("k below the drafter's", ask("fewer tokens"), "fewer tokens"),
    Row("k by batch size", batches(4), "tokens by batch"),
    Row("scheduled ahead", arrivals, "scheduled ahead"),
    Row(
        "scheduled ahead, preemption",
        ask_lengths("ahead", (90, 100, 110, 95, 105, 120), max_tokens=70),
        "ahead, few blocks",
        ("preemptions",),
    ),
)
