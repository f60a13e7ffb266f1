# SPDX-License-Identifier: Apache-2.0
"""Which requests can be answered with speculation.

vLLM refuses some sampling parameters itself. What it takes, and then loses where drafts
are verified, is refused here: for the one request, when it is added.
"""

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_mtp.plugin import METHOD


def require_verifiable(params: SamplingParams) -> None:
    """Refuse a request that vLLM's rejection samplers cannot answer as a whole.

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
