# SPDX-License-Identifier: Apache-2.0
"""Every sampling parameter of a request, beside speculation: answered or refused."""

from collections.abc import Callable, Mapping
from inspect import getsource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RepetitionDetectionParams

from tests.serving.engines import ON_V2, engine
from tests.serving.lossless.matrix import LOGPROB_MARGIN
from tests.serving.lossless.rows import ROWS
from tests.serving.lossless.subjects import make_speaker
from tests.tiny_targets import make_tiny_llama
from vllm_mtp.serving.ledger import REQUESTS, is_installed
from vllm_mtp.serving.requests import require_verifiable

# Who says what becomes of a field: a row of the lossless matrix, a test, or why there
# is nothing to show.
BY_ROW = {
    "allowed_token_ids": "allowed tokens",
    "bad_words": "bad words",
    "frequency_penalty": "penalties",
    "ignore_eos": "EOS inside a draft",
    "logprobs": "logprobs",
    "max_tokens": "requests come and go",
    "min_tokens": "min_tokens",
    "n": "sampled, top-k 1, n = 3",
    "presence_penalty": "penalties",
    "prompt_logprobs": "prompt logprobs",
    "repetition_penalty": "penalties",
    "stop": "stop strings",
    "stop_token_ids": "stop tokens",
    "structured_outputs": "JSON schema",
    "temperature": "greedy beside sampled",
    "top_k": "sampled, top-k 1, n = 3",
    "top_p": "sampled, top-p near 0",
}
BY_TEST = {
    "flat_logprobs": "test_a_rarer_field_is_answered_as_without",
    "include_stop_str_in_output": "test_a_rarer_field_is_answered_as_without",
    "logit_bias": "test_matrix.py: test_what_vllm_refuses_with_any_speculation",
    "logprob_token_ids": "test_one_request_is_refused_and_the_others_are_answered",
    "min_p": "test_matrix.py: test_what_vllm_refuses_with_any_speculation",
    "repetition_detection": "test_a_rarer_field_is_answered_as_without",
    "seed": "test_seeds.py",
}
_TEXT = "of the text, which is made from verified tokens alone"
_OWN = "vLLM's own"
_PROMPT = "of the prompt, which is never verified"
NOTHING_TO_SHOW = {
    "_all_stop_token_ids": _OWN,
    "_bad_words_token_ids": _OWN,
    "_eos_token_id": _OWN,
    "_watermarking_skipped": _OWN,
    "detokenize": _TEXT,
    "extra_args": "of custom logits processors: vLLM refuses to start with both",
    "output_kind": _TEXT,
    "output_text_buffer_length": _OWN,
    "prompt_logprob_start": _PROMPT,
    "prompt_logprob_token_ids": _PROMPT,
    "routed_experts_prompt_start": _PROMPT,
    "skip_clone": _OWN,
    "skip_reading_prefix_cache": _PROMPT,
    "skip_special_tokens": _TEXT,
    "spaces_between_special_tokens": _TEXT,
    "thinking_token_budget": "not looked at yet: a draft may pass the budget",
    "trace_decode_token_ids": "vLLM refuses it with any speculation",
    "stream_interval": _TEXT,
    "watermarking": "needs --watermark-config, which the method refuses",
}
KNOWN = BY_ROW | BY_TEST | NOTHING_TO_SHOW

PROMPTS = [[(7 * i + j) % 512 for i in range(20 + j)] for j in range(3)]
MAX_TOKENS = 8 if ON_V2 else 24


def test_every_field_is_known() -> None:
    """A field that a new vLLM brings is looked at before it is served."""
    fields = SamplingParams.__struct_fields__
    assert set(fields) - KNOWN.keys() == set()
    assert set(BY_ROW.values()) <= {row.name for row in ROWS}


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


RARER = {
    "flat_logprobs": {"flat_logprobs": True, "logprobs": 2},
    "logprobs 0": {"logprobs": 0},
    "include_stop_str_in_output": {
        "stop": ["a", "ti", "e "],
        "include_stop_str_in_output": True,
        "detokenize": True,
    },
    "repetition_detection": {
        "repetition_detection": RepetitionDetectionParams(
            max_pattern_size=4, min_count=2
        )
    },
}


@pytest.mark.engine
@pytest.mark.skipif(ON_V2, reason="one runner will do: the runners see none of these")
def test_a_rarer_field_is_answered_as_without(
    tmp_path: Path, tiny_drafter: SPEC
) -> None:
    target = make_speaker(make_tiny_llama(tmp_path))
    found = []
    for spec in (None, spec_for(tiny_drafter("llama", "shared-4"))):
        with engine(target, spec) as llm:
            found.append(
                [
                    answer(llm, {"0": params(**sampling)})["0"]
                    for sampling in RARER.values()
                ]
            )
    for name, one, other in zip(RARER, *found, strict=True):
        assert (one.token_ids, one.text) == (other.token_ids, other.text), name
        assert one.finish_reason == other.finish_reason, name
        if name == "flat_logprobs":
            assert one.logprobs.token_ids == other.logprobs.token_ids
        else:
            require_alike(one, other)


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
