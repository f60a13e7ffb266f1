# SPDX-License-Identifier: Apache-2.0
"""Which requests have ended, as far as a worker can tell.

vLLM's scheduler decides it, and asks the worker for drafts all the same. The next
request then waits for drafts that nobody takes.
"""

from collections.abc import Iterable, Sequence
from typing import Any


def all_have_ended(requests: Iterable[Any], newest: int) -> bool:
    """Whether none of the requests goes on.

    A request that seems to have ended and has not is only without drafts for a step.

    Args:
        requests: vLLM's ``CachedRequestState``, after the step's tokens were added.
        newest: Most tokens that a step adds to one of them.
    """
    return all(
        _has_ended(request.sampling_params, request.output_token_ids, newest)
        for request in requests
    )


def _has_ended(params: Any, output_token_ids: Sequence[int], newest: int) -> bool:
    """By a token that stops it, or by the number of its tokens."""
    if params is None:
        return False
    if params.max_tokens is not None and len(output_token_ids) >= params.max_tokens:
        return True
    # The second holds the model's end token as well, and those of the request.
    stops = params.stop_token_ids if params.ignore_eos else params.all_stop_token_ids
    return not set(stops or ()).isdisjoint(output_token_ids[-newest:])
