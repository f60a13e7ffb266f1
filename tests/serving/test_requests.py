# SPDX-License-Identifier: Apache-2.0
"""Every sampling parameter of a request, beside speculation: answered or refused."""

import json
import pkgutil
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from inspect import getsource
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.reasoning import ReasoningParserManager
from vllm.sampling_params import StructuredOutputsParams
from vllm.tool_parsers import ToolParserManager

from tests.serving.engines import ON_V2, engine
from tests.serving.lossless.fields import (
    OPENAI,
    SAMPLING_PARAMS,
    STRUCTURED_OUTPUTS,
    By,
)
from tests.serving.lossless.matrix import LOGPROB_MARGIN
from tests.serving.lossless.rows import ROWS
from tests.tiny_tokenizer import save_tiny_tokenizer
from vllm_mtp.serving.ledger import REQUESTS, is_installed
from vllm_mtp.serving.requests import require_verifiable

PROMPTS = [[(7 * i + j) % 512 for i in range(20 + j)] for j in range(3)]
MAX_TOKENS = 8 if ON_V2 else 24


TABLES = {
    "SamplingParams": (SAMPLING_PARAMS, set(SamplingParams.__struct_fields__)),
    "StructuredOutputsParams": (
        STRUCTURED_OUTPUTS,
        {field.name for field in fields(StructuredOutputsParams)},
    ),
    "the OpenAI API": (
        SAMPLING_PARAMS | OPENAI,
        {
            name
            for model in (ChatCompletionRequest, CompletionRequest, ResponsesRequest)
            for name in model.model_fields
        },
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_field_is_decided_on(name: str) -> None:
    """A field that a new vLLM brings is looked at before it is served."""
    known, there = TABLES[name]
    assert there - known.keys() == set()


def test_no_field_is_made_up() -> None:
    there = set().union(*(names for _, names in TABLES.values()))
    assert (SAMPLING_PARAMS | STRUCTURED_OUTPUTS | OPENAI).keys() - there == set()


@pytest.mark.parametrize("field", SAMPLING_PARAMS | STRUCTURED_OUTPUTS | OPENAI)
def test_what_is_decided_is_there(field: str) -> None:
    by, what = (SAMPLING_PARAMS | STRUCTURED_OUTPUTS | OPENAI)[field]
    if by is By.ROW:
        assert what in {row.name for row in ROWS}
    elif by is By.TEST:
        file, _, test = what.partition(": ")
        assert f"def {test}(" in (Path(__file__).parent / file).read_text("utf-8")
    elif by is By.VLLM:
        function = pkgutil.resolve_name(what)
        assert f"self.{field}" in getsource(function)
        assert "speculative" in getsource(function)
    elif by is By.OURS:
        asked = params(**{field: [1]})
        with pytest.raises(VLLMValidationError, match=f"^{what}"):
            require_verifiable(asked, ours())


def test_vllm_still_loses_them() -> None:
    """Else the ledger's entry ``requests`` can go."""
    from vllm.v1.sample import rejection_sampler as of_v1

    assert "logprob_token_ids" not in getsource(of_v1), REQUESTS.remove_when


def params(**sampling: Any) -> SamplingParams:
    usual = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    return SamplingParams(**usual | {"detokenize": False} | sampling)


def answer(llm: LLM, params_of: Mapping[str, SamplingParams]) -> dict[str, Any]:
    """Add requests by name, and run the engine until all are answered."""
    engine, done = llm.llm_engine, {}
    for prompt, (name, wanted) in zip(PROMPTS, params_of.items(), strict=False):
        engine.add_request(name, {"prompt_token_ids": prompt}, wanted)
    while engine.has_unfinished_requests():
        done |= {o.request_id: o.outputs[0] for o in engine.step() if o.finished}
    return done


def require_alike(one: Any, other: Any) -> None:
    """The same tokens, and as many logprobs of the same values."""
    assert one.token_ids == other.token_ids
    assert (one.logprobs is None) == (other.logprobs is None)
    for a, b in zip(one.logprobs or (), other.logprobs or (), strict=True):
        assert a.keys() == b.keys()
        assert all(abs(a[t].logprob - b[t].logprob) < LOGPROB_MARGIN for t in a)


SPEC = Callable[[str, str], Path]


def spec_for(folder: Path) -> dict[str, Any]:
    return {"method": "mtp_placeholder", "model": str(folder)}


@pytest.mark.engine
def test_one_request_is_refused_and_the_others_are_answered(
    tiny_targets: dict[str, Path], tiny_drafter: SPEC
) -> None:
    """vllm#42592: on V1 it ended the engine for all; or its logprobs went missing."""
    others = {"two": params(logprobs=2), "none": params()}
    spec = spec_for(tiny_drafter("llama", "shared-4"))
    with engine(tiny_targets["llama"], spec) as llm:
        for wanted in (
            {"logprob_token_ids": [5, 6, 7]},
            {"logprob_token_ids": [5, 6, 7], "logprobs": 3},
            {"logprob_token_ids": []},
        ):
            llm.llm_engine.add_request(
                "before", {"prompt_token_ids": PROMPTS[0]}, params(logprobs=1)
            )
            with pytest.raises(VLLMValidationError, match="^logprob_token_ids: ") as e:
                answer(llm, {"refused": params(**wanted)})
            assert "\n" not in str(e.value)
            assert "ask for logprobs" in str(e.value)
            drafted = answer(llm, others)
            assert drafted.keys() == {"before", *others}
            assert len(drafted["before"].logprobs) == MAX_TOKENS
    # An engine without the method, in the process where the patch is.
    assert is_installed(REQUESTS)
    with engine(tiny_targets["llama"]) as llm:
        plain = answer(llm, others)
        ids = answer(llm, {"ids": params(logprob_token_ids=[5, 6, 7])})["ids"]
    for name in others:
        require_alike(drafted[name], plain[name])
    assert [{5, 6, 7} <= step.keys() for step in ids.logprobs] == [True] * MAX_TOKENS


@pytest.mark.parametrize("wanted", [-1, 5, 2.0, "2", True, None, [1]])
def test_a_request_asks_for_a_number_of_drafts_that_there_is(wanted: Any) -> None:
    asked = params(extra_args={"num_speculative_tokens": wanted})
    with pytest.raises(
        VLLMValidationError, match="expected an integer from 0 to 4"
    ) as e:
        require_verifiable(asked, ours())
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("wanted", [0, 1, 4])
def test_a_number_of_drafts_is_refused_where_it_would_be_ignored(wanted: int) -> None:
    asked = params(extra_args={"num_speculative_tokens": wanted, "else": "x"})
    require_verifiable(asked, ours())
    require_verifiable(params(extra_args={"else": "x"}), ours(takes_any_length=False))
    with pytest.raises(VLLMValidationError, match="gives all requests the same number"):
        require_verifiable(asked, ours(takes_any_length=False))


def ours(takes_any_length: bool = True) -> Any:
    return SimpleNamespace(num_speculative_tokens=4, takes_any_length=takes_any_length)


CALLS = [{"name": "weather", "arguments": {"city": city}} for city in ("Rome", "Oslo")]
SAID = "<think>Where?</think>I look. " + "\n".join(
    f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in CALLS
)


def streamed(tokenizer: Any, sizes: Iterator[int]) -> tuple[str, list[Any]]:
    """What a chat client gets of `SAID` in pieces of so many tokens: the reasoning, and
    the calls."""
    ids = tokenizer.encode(SAID)
    thinks = ReasoningParserManager.get_reasoning_parser("deepseek_r1")(tokenizer)
    tools = ToolParserManager.get_tool_parser("hermes")(tokenizer, [])
    request = ChatCompletionRequest(messages=[], model="any")
    reasoning, calls = "", [["", ""] for _ in CALLS]
    seen: list[int] = []
    while len(seen) < len(ids):
        now = ids[: len(seen) + next(sizes)]
        before, after = tokenizer.decode(seen), tokenizer.decode(now)
        piece = after[len(before) :], seen, now, now[len(seen) :]
        said = thinks.extract_reasoning_streaming(before, after, *piece)
        reasoning += (said and said.reasoning) or ""
        found = tools.extract_tool_calls_streaming(before, after, *piece, request)
        for call in (found and found.tool_calls) or ():
            calls[call.index][0] += call.function.name or ""
            calls[call.index][1] += call.function.arguments or ""
        seen = now
    return reasoning, calls


def test_parsers_read_pieces_of_any_size(tmp_path: Path) -> None:
    """A step with drafts gives several tokens at once, which may begin before the end
    of the reasoning, or of a call, and end behind it."""
    save_tiny_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    for seed in range(20):
        rng = random.Random(seed)
        # The first token comes with the prompt, and alone.
        sizes = (rng.randint(1, 9) if seed and n else 1 for n in count())
        reasoning, calls = streamed(tokenizer, sizes)
        assert reasoning == "Where?", seed
        found = [{"name": name, "arguments": json.loads(text)} for name, text in calls]
        assert found == CALLS, seed
