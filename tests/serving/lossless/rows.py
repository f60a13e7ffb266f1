# SPDX-License-Identifier: Apache-2.0
"""The rows of the matrix, as data."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from vllm.config import ReasoningConfig
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

from tests.serving.lossless.plays import (
    Play,
    aborts,
    arrivals,
    ask,
    batches,
    beams,
    crowd,
    drafts_by_request,
    embedded,
    mixed_sampling,
    near_the_limit,
    reset_in_between,
    rounds,
    streamed,
    thinking,
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
        few_blocks: With fewer cache blocks than the requests need.
        least_tokens: Drafters of fewer tokens cannot be asked for this.
    """

    settings: Mapping[str, Any]
    spec: Mapping[str, Any] | None = None
    scheduled_ahead: bool = False
    few_blocks: bool = False
    least_tokens: int = 1

    @property
    def plain(self) -> str:
        """Engines of the same name here are one for the target alone."""
        return f"{sorted(self.settings.items())}, few blocks: {self.few_blocks}"


_MANY = {"max_num_seqs": 64}
_TIGHT = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
_THINKING = _MANY | {
    "reasoning_parser": "deepseek_r1",
    # What ends thinking by force: several tokens, of which two are said first.
    "reasoning_config": ReasoningConfig(reasoning_end_str="so, </think>"),
}
ENGINES = {
    "default": Engine(
        # Or a tiny target fills its JSON with blanks, which need no drafts.
        _MANY
        | {
            "structured_outputs_config": {
                "backend": "xgrammar",
                "disable_any_whitespace": True,
            }
        }
    ),
    # Long prompts come in pieces, and requests are thrown out and start again.
    "tight": Engine(_TIGHT, few_blocks=True),
    "no prefix cache": Engine(_MANY | {"enable_prefix_caching": False}),
    "blocks of 64": Engine(_MANY | {"block_size": 64, "enable_prompt_embeds": True}),
    "fp8 cache": Engine(_MANY | {"kv_cache_dtype": "fp8"}),
    "fewer tokens": Engine(_MANY, {"num_speculative_tokens": 2}, least_tokens=2),
    "tokens by batch": Engine(
        _MANY,
        {"num_speculative_tokens_per_batch_size": [(1, 2, 4), (3, 8, 2), (9, 64, 1)]},
        least_tokens=4,
    ),
    "probabilistic": Engine(_MANY, {"draft_sample_method": "probabilistic"}),
    "thinking": Engine(_THINKING, least_tokens=4),
    "thinking, ahead": Engine(_THINKING, scheduled_ahead=True, least_tokens=4),
    "scheduled ahead": Engine(_TIGHT, scheduled_ahead=True, few_blocks=True),
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
        first: The first token of a drafter that is the target is always accepted,
            where `matrix.Result` does not excuse it.
        drafts: Whether the drafter is used at all.
        trims: vLLM takes away drafts that a grammar forbids, often all of them.
        on_v2: Also for the V2 runner, of which a step takes long on a CPU.
    """

    name: str
    play: Play
    engine: str = "default"
    shows: tuple[str, ...] = ()
    same_hits: bool = False
    first: bool = False
    drafts: bool = True
    trims: bool = False
    on_v2: bool = False


def _structured(**what: Any) -> Mapping[str, Any]:
    return {
        "structured_outputs": StructuredOutputsParams(**what),
        "ignore_eos": False,
        "max_tokens": 32,
    }


# Strings of any letters, so that a drafter that knows no grammar is right within them.
_TEXT = {"type": "string", "minLength": 12, "maxLength": 40}
_SCHEMA = {
    "type": "object",
    "properties": {
        "name": _TEXT,
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "bb", "ccc"]}},
    },
    "required": ["name", "age", "tags"],
}
_REGEX = r"([a-z]{3,9}[ ,.]?){2,9}(\d{2}-)?[a-f]+"
_GRAMMAR = """root ::= term ((" + " | " - ") term)*
term ::= [a-z]+ | [0-9]+ | "(" root ")"
"""
# Of many letters, or vLLM takes all drafts away.
_CHOICES = ["".join(word) for word in product("abcdefghijk", repeat=4)]
_TAG = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "triggers": ["a"],
        "tags": [
            {
                "begin": "a",
                "content": {"type": "regex", "pattern": "[a-m ]{4,12}"},
                "end": "z",
            }
        ],
    },
}
_STOPS = ["ef", "ti", "ly", "q", "x"]
_RAW = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
_STOP_TOKENS = list(range(5, 512, 16))
_ONE = {"temperature": 1.0, "top_k": 1}

ROWS = (
    Row("one request at a time", batches(1), first=True),
    Row("batches of 4, mixed lengths", batches(4), first=True, on_v2=True),
    Row("batches of 16, mixed lengths", batches(16), first=True),
    Row("all at once, up to 64", ask("at once"), first=True),
    Row("requests come and go", arrivals, first=True, on_v2=True),
    Row(
        "prompts a second time",
        twice("twice"),
        shows=("prefix_hits",),
        same_hits=True,
        on_v2=True,
    ),
    # After a prefix-cache hit that leaves one token to compute, vLLM pads the step with
    # drafts that no drafter has made: no prompt here is one longer than whole blocks.
    Row(
        "prompts a second time, more left",
        twice("twice 2", (64, 96, 100, 130, 31, 200)),
        shows=("prefix_hits",),
        same_hits=True,
        first=True,
    ),
    Row("three turns", turns, shows=("prefix_hits",), same_hits=True),
    Row("prefix cache emptied", reset_in_between),
    Row("no prefix cache", ask("no prefix cache"), "no prefix cache", first=True),
    Row(
        "prompts in pieces",
        ask("pieces", (150, 30, 151, 97, 200, 10)),
        "tight",
        ("chunked", "mixed"),
        first=True,
        on_v2=True,
    ),
    Row("prompts in pieces, twice", twice("pieces 2"), "tight", ("prefix_hits",)),
    Row(
        "preemption, some twice",
        crowd("preempted"),
        "tight",
        ("preemptions", "preempted_twice"),
        first=True,
        on_v2=True,
    ),
    Row(
        "one, some, all at max_model_len",
        near_the_limit,
        shows=("at_limit",),
        first=True,
        on_v2=True,
    ),
    Row("cache blocks of 64", twice("blocks of 64"), "blocks of 64", ("prefix_hits",)),
    Row("fp8 KV cache", ask("fp8"), "fp8 cache", first=True),
    Row("aborts at every stage", aborts, "tight", ("chunked",), on_v2=True),
    Row(
        "EOS inside a draft", ask("eos", ignore_eos=False), shows=("ended",), on_v2=True
    ),
    Row("stop tokens", ask("stop", stop_token_ids=_STOP_TOKENS), shows=("ended",)),
    Row("stop strings", ask("strings", stop=_STOPS), shows=("ended",)),
    Row(
        "stop strings kept",
        ask("kept", stop=_STOPS, include_stop_str_in_output=True),
        shows=("ended",),
    ),
    Row(
        "repetition detection",
        ask(
            "repeated",
            max_tokens=40,
            repetition_detection=RepetitionDetectionParams(
                max_pattern_size=8, min_count=2
            ),
        ),
        shows=("ended",),
    ),
    Row("streamed", streamed),
    Row("raw text", ask("raw", ignore_eos=False, **_RAW)),
    Row("no text", ask("no text", detokenize=False)),
    Row("drafts by request", drafts_by_request),
    Row(
        "min_tokens",
        ask("min", ignore_eos=False, min_tokens=9, stop_token_ids=_STOP_TOKENS),
        shows=("ended",),
    ),
    Row("logprobs", ask("logprobs", logprobs=5), on_v2=True),
    Row("prompt logprobs", ask("prompt logprobs", prompt_logprobs=3, logprobs=2)),
    Row(
        "flat logprobs", ask("flat", flat_logprobs=True, logprobs=2, prompt_logprobs=1)
    ),
    Row("prefix cache not read", twice("unread", skip_reading_prefix_cache=True)),
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
    Row(
        "JSON schema",
        rounds(3, "json", **_structured(json=_SCHEMA)),
        trims=True,
    ),
    Row(
        "JSON object",
        ask("object", **_structured(json_object=True)),
        "blocks of 64",
        trims=True,
    ),
    Row(
        "regular expression",
        rounds(2, "regex", **_structured(regex=_REGEX)),
        trims=True,
    ),
    Row("grammar", rounds(2, "grammar", **_structured(grammar=_GRAMMAR)), trims=True),
    Row("choice", rounds(12, "choice", **_structured(choice=_CHOICES)), trims=True),
    Row(
        "structural tag",
        ask("tag", **_structured(structural_tag=json.dumps(_TAG))),
        trims=True,
    ),
    Row("thinking budgets", thinking(None, max_tokens=40), "thinking"),
    Row(
        "thinking budgets, scheduled ahead",
        thinking(None, max_tokens=40),
        "thinking, ahead",
    ),
    Row(
        "thinking, then a regular expression",
        thinking(999, **_structured(regex=_REGEX)),
        "thinking",
        trims=True,
    ),
    Row("prompts as embeddings", embedded, "blocks of 64"),
    Row("beam search", beams, drafts=False),
    Row("k below the drafter's", ask("fewer tokens"), "fewer tokens"),
    Row("k by batch size", batches(4), "tokens by batch"),
    Row("scheduled ahead", arrivals, "scheduled ahead", first=True, on_v2=True),
    Row(
        "scheduled ahead, twice",
        twice("ahead 2", (64, 96, 100, 130, 31, 200)),
        "scheduled ahead",
        ("prefix_hits",),
    ),
    Row(
        "scheduled ahead, in pieces",
        ask("ahead, pieces", (150, 30, 151, 97, 200, 10)),
        "scheduled ahead",
        ("chunked", "mixed"),
        first=True,
    ),
    Row(
        "scheduled ahead, preemption",
        crowd("ahead"),
        "scheduled ahead",
        ("preemptions",),
        first=True,
        on_v2=True,
    ),
    Row(
        "scheduled ahead, at max_model_len",
        near_the_limit,
        "scheduled ahead",
        ("at_limit",),
        first=True,
    ),
)
