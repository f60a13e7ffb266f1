# SPDX-License-Identifier: Apache-2.0
"""Which requests can be answered with speculation.

vLLM refuses some sampling parameters itself. What it takes, and then loses where drafts
are verified, is refused here: for the one request, when it is added.
"""

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_mtp.plugin import METHOD

MOST_DRAFTS = "num_speculative_tokens"
"""Key of ``extra_args`` (``vllm_xargs`` of the server's API) by which a request asks
for fewer drafts; 0 for none."""


def require_verifiable(params: SamplingParams, speculative_config: Any) -> None:
    """Refuse a request that cannot be answered as it asks.

    Args:
        params: The request's.
        speculative_config: Ours.

    Raises:
        VLLMValidationError: With what to ask for instead.
    """
    # An empty list is among those that the V1 sampler gathers logprobs for.
    if params.logprob_token_ids is not None:
        raise VLLMValidationError(
            f"logprob_token_ids: not supported with speculative decoding (method "
            f"{METHOD!r}), since vLLM does not give their logprobs for verified "
            "tokens; ask for logprobs, or serve without speculation",
            parameter="logprob_token_ids",
            value=params.logprob_token_ids,
        )
    extra_args = params.extra_args or {}
    if MOST_DRAFTS not in extra_args:
        return
    wanted = extra_args[MOST_DRAFTS]
    most = speculative_config.num_speculative_tokens
    if type(wanted) is not int or not 0 <= wanted <= most:
        raise VLLMValidationError(
            f"vllm_xargs.{MOST_DRAFTS}: got {wanted!r}, expected an integer from 0 to "
            f"{most}; ask for that, or leave it out",
            parameter="vllm_xargs",
            value=wanted,
        )
    if not speculative_config.takes_any_length:
        raise VLLMValidationError(
            f"vllm_xargs.{MOST_DRAFTS}: got {wanted}, but this server gives all "
            "requests the same number of drafts (a request can choose on the V1 runner "
            "on a CPU, in one process, with greedy drafts); leave it out",
            parameter="vllm_xargs",
            value=wanted,
        )
