# SPDX-License-Identifier: Apache-2.0
"""What becomes of every field of a request, beside speculation: the one table.

A release of vLLM that brings a field fails `test_requests.py` until the field is here.
"""

from enum import Enum
from typing import NamedTuple


class By(Enum):
    """Who says what becomes of a field."""

    ROW = "a row of the lossless matrix"
    TEST = "a test, as `file.py: name`"
    VLLM = "vLLM refuses it with any speculation, in this `module:function`"
    OURS = "we refuse the one request, with a message that begins so"
    NONE = "nothing to show: it has no effect on tokens, or none that drafts can change"


class Decision(NamedTuple):
    """Who, and which."""

    by: By
    what: str


def _row(name: str) -> Decision:
    return Decision(By.ROW, name)


def _test(name: str) -> Decision:
    return Decision(By.TEST, name)


def _none(why: str) -> Decision:
    return Decision(By.NONE, why)


def _vllm(function: str) -> Decision:
    return Decision(By.VLLM, f"vllm.sampling_params:SamplingParams.{function}")


_OWN = _none("vLLM's own")
_PROMPT = _none("of the prompt, which is never verified")
_REPLY = _none("of the reply, which is made from verified tokens")
_LABEL = _none("of bookkeeping: it reaches no engine, or only names the request")
_EXPERTS = _none("of debugging: only with --enable-return-routed-experts")

_SEEDS = (
    "test_seeds.py: test_the_same_request_gives_the_same_text_alone_and_among_others"
)

SAMPLING_PARAMS = {
    "_all_stop_token_ids": _OWN,
    "_bad_words_token_ids": _OWN,
    "_eos_token_id": _OWN,
    "_watermarking_skipped": _OWN,
    "allowed_token_ids": _row("allowed tokens"),
    "bad_words": _row("bad words"),
    "detokenize": _row("no text"),
    "extra_args": _row("drafts by request"),
    "flat_logprobs": _row("flat logprobs"),
    "frequency_penalty": _row("penalties"),
    "ignore_eos": _row("EOS inside a draft"),
    "include_stop_str_in_output": _row("stop strings kept"),
    "logit_bias": _vllm("_validate_spec_decode"),
    "logprob_token_ids": Decision(By.OURS, "logprob_token_ids: not supported"),
    "logprobs": _row("logprobs"),
    "max_tokens": _row("requests come and go"),
    "min_p": _vllm("_validate_spec_decode"),
    "min_tokens": _row("min_tokens"),
    "n": _row("sampled, top-k 1, n = 3"),
    "output_kind": _row("streamed"),
    "output_text_buffer_length": _OWN,
    "presence_penalty": _row("penalties"),
    "prompt_logprob_start": _PROMPT,
    "prompt_logprob_token_ids": _PROMPT,
    "prompt_logprobs": _row("prompt logprobs"),
    "repetition_detection": _row("repetition detection"),
    "repetition_penalty": _row("penalties"),
    "routed_experts_prompt_start": _EXPERTS,
    "seed": _test(_SEEDS),
    "skip_clone": _OWN,
    "skip_reading_prefix_cache": _row("prefix cache not read"),
    "skip_special_tokens": _row("raw text"),
    "spaces_between_special_tokens": _row("raw text"),
    "stop": _row("stop strings"),
    "stop_token_ids": _row("stop tokens"),
    "stream_interval": _row("streamed"),
    "structured_outputs": _row("JSON schema"),
    "temperature": _row("greedy beside sampled"),
    "thinking_token_budget": _row("thinking budgets"),
    "top_k": _row("sampled, top-k 1, n = 3"),
    "top_p": _row("sampled, top-p near 0"),
    "trace_decode_token_ids": _vllm("_validate_trace_replay"),
    "watermarking": _none("needs --watermark-config, which the method refuses"),
}
STRUCTURED_OUTPUTS = {
    "_backend": _OWN,
    "_backend_was_auto": _OWN,
    "choice": _row("choice"),
    # vLLM reads these two from the engine's settings.
    "disable_additional_properties": _row("JSON schema"),
    "disable_any_whitespace": _row("JSON schema"),
    "grammar": _row("grammar"),
    "json": _row("JSON schema"),
    "json_object": _row("JSON object"),
    "regex": _row("regular expression"),
    "structural_tag": _row("structural tag"),
    "whitespace_pattern": _row("JSON schema"),
}
# Their grammars are rows as well.
_TOOLS = _test("test_requests.py: test_parsers_read_pieces_of_any_size")
# Of the requests of the OpenAI API, what is no field of `SamplingParams`.
OPENAI = {
    "add_generation_prompt": _PROMPT,
    "add_special_tokens": _PROMPT,
    "background": _LABEL,
    "cache_salt": _PROMPT,
    "chat_template": _PROMPT,
    "chat_template_kwargs": _PROMPT,
    "continue_final_message": _PROMPT,
    "documents": _PROMPT,
    "ec_transfer_params": _PROMPT,
    "echo": _row("prompt logprobs"),
    "enable_response_messages": _REPLY,
    "include": _REPLY,
    "include_reasoning": _REPLY,
    "input": _PROMPT,
    "instructions": _PROMPT,
    "kv_transfer_params": _none("needs a KV connector, which the method refuses"),
    "length_penalty": _row("beam search"),
    "max_completion_tokens": _row("requests come and go"),
    "max_output_tokens": _row("requests come and go"),
    "max_tool_calls": _REPLY,
    "media_io_kwargs": _PROMPT,
    "messages": _PROMPT,
    "metadata": _LABEL,
    "mm_payload": _PROMPT,
    "mm_processor_kwargs": _PROMPT,
    "model": _LABEL,
    "parallel_tool_calls": _REPLY,
    "previous_input_messages": _PROMPT,
    "previous_response_id": _PROMPT,
    "priority": _row("preemption, some twice"),
    "prompt": _PROMPT,
    "prompt_cache_key": _LABEL,
    "prompt_embeds": _row("prompts as embeddings"),
    "reasoning": _PROMPT,
    "reasoning_effort": _PROMPT,
    "request_id": _LABEL,
    "response_format": _row("JSON schema"),
    "return_mm_kwargs": _PROMPT,
    "return_prompt_text": _PROMPT,
    "return_token_ids": _REPLY,
    "return_token_offsets": _REPLY,
    "return_tokens_as_token_ids": _REPLY,
    "service_tier": _LABEL,
    "session_id": _LABEL,
    "store": _LABEL,
    "stream": _row("streamed"),
    "stream_options": _REPLY,
    "suffix": _none("vLLM refuses it, with and without speculation"),
    "text": _row("JSON schema"),
    "tool_choice": _TOOLS,
    "tools": _TOOLS,
    "top_logprobs": _row("logprobs"),
    "truncate_prompt_tokens": _PROMPT,
    "truncation": _PROMPT,
    "truncation_side": _PROMPT,
    "use_beam_search": _row("beam search"),
    "user": _LABEL,
    "vllm_xargs": _row("drafts by request"),
}

# With budgets, the target alone leaves one to the next request in its row, and is no
# measure (docs/upstream/README.md). What vLLM refuses without speculation says nothing.
_NOT_IN_RANDOM_REQUESTS = {"thinking_token_budget", "trace_decode_token_ids"}
IN_RANDOM_REQUESTS = {
    name for name, (by, _) in SAMPLING_PARAMS.items() if by is not By.NONE
} - _NOT_IN_RANDOM_REQUESTS
"""Fields of ``SamplingParams`` that `test_random_requests.py` draws."""
