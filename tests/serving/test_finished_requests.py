# SPDX-License-Identifier: Apache-2.0
"""Which requests have ended."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams

from vllm_mtp.serving.finished_requests import all_have_ended

EOS, STOP = 2, 7


def request(output: list[int], **settings: Any) -> SimpleNamespace:
    params = SamplingParams(**{"max_tokens": 10, **settings})
    params.update_from_generation_config({}, eos_token_id=EOS)
    return SimpleNamespace(sampling_params=params, output_token_ids=output)


@pytest.mark.parametrize(
    ("output", "settings", "ended"),
    [
        ([5, 5], {}, False),
        ([5, EOS], {}, True),
        ([5, EOS, 6, 6], {}, True),  # in the middle of the step's tokens
        ([EOS, 5, 6, 6], {}, False),  # not of this step
        ([5, EOS], {"ignore_eos": True}, False),
        ([5, STOP], {}, False),
        ([5, STOP], {"stop_token_ids": [STOP]}, True),
        ([5, STOP], {"stop_token_ids": [STOP], "ignore_eos": True}, True),
        ([5] * 9, {}, False),
        ([5] * 10, {}, True),
        ([5] * 11, {}, True),
        ([5] * 11, {"max_tokens": None}, False),
        ([], {}, False),
    ],
)
def test_one_request(output: list[int], settings: dict[str, Any], ended: bool) -> None:
    assert all_have_ended([request(output, **settings)], newest=3) == ended


def test_one_that_goes_on_is_enough() -> None:
    done, going = request([EOS]), request([5])
    assert all_have_ended([done, done], newest=3)
    assert not all_have_ended([done, going], newest=3)


def test_pooling_requests_have_no_end() -> None:
    pooling = SimpleNamespace(sampling_params=None, output_token_ids=[])
    assert not all_have_ended([pooling], newest=3)
