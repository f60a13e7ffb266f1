# SPDX-License-Identifier: Apache-2.0
"""Sides, and which of them share a server."""

from dataclasses import replace

import pytest
import torch

from vllm_mtp.bench.plan import (
    Load,
    Plan,
    auto_side,
    control_side,
    drafter_sides,
    length_is_chosen_while_serving,
    ngram_side,
    plain_side,
    self_draft_side,
)
from vllm_mtp.serving.settings import checked

METHOD = {"method": "mtp_placeholder", "model": "/d/ours"}
LOADS = (Load("1 at once", ("a",), 1, 8),)


def test_the_number_of_tokens_is_left_to_the_method() -> None:
    side = auto_side("ours", "/d/ours")
    assert side.name == "ours auto"
    assert side.speculative_config == METHOD
    assert side.extra_body is None
    assert side.num_speculative_tokens is None
    assert checked(METHOD)  # as the server will


def test_fixed_numbers_share_the_server_of_the_largest() -> None:
    sides = drafter_sides("ours", "/d/ours", [2, 4, 1], per_request=True)
    assert [side.name for side in sides] == ["ours k=2", "ours k=4", "ours k=1"]
    for side, k in zip(sides, (2, 4, 1), strict=True):
        assert side.speculative_config == METHOD | {"num_speculative_tokens": 4}
        assert side.extra_body == {"vllm_xargs": {"num_speculative_tokens": k}}
    all_sides = (plain_side(), *sides, auto_side("ours", "/d/ours"), control_side())
    plan = Plan("/targets/tiny", "float32", 256, 2, all_sides, LOADS)
    # Two without speculation are two servers, although nothing tells them apart.
    assert list(plan.servers) == ["none", "ours, any k", "ours auto", "none again"]
    others = drafter_sides("other", "/d/other", [2, 4], per_request=True)
    plan = replace(plan, sides=(*all_sides, *others))
    assert len(plan.servers) == 5, "a drafter's server is not for another drafter"


@pytest.mark.parametrize(
    ("lengths", "per_request"), [([2, 4], False), ([4], True), ([], True)]
)
def test_elsewhere_each_fixed_number_has_a_server(
    lengths: list[int], per_request: bool
) -> None:
    sides = drafter_sides("ours", "/d/ours", lengths, per_request=per_request)
    assert [side.server for side in sides] == [f"ours k={k}" for k in lengths]
    for side, k in zip(sides, lengths, strict=True):
        assert side.speculative_config == METHOD | {"num_speculative_tokens": k}
        assert side.extra_body is None


@pytest.mark.parametrize(
    ("gpu", "forced", "expected"),
    [
        (False, None, True),
        (False, "0", True),
        (False, "1", False),
        (True, None, False),
        (True, "0", False),
    ],
)
def test_requests_have_lengths_on_v1_on_a_cpu(
    gpu: bool, forced: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    if forced is None:
        monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    else:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", forced)
    assert length_is_chosen_while_serving() == expected


def test_stock_sides_are_as_vllm_takes_them() -> None:
    assert ngram_side(4).speculative_config == {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 4,
    }
    config = self_draft_side("/targets/tiny", 4).speculative_config
    assert config is not None
    assert config["model"] == "/targets/tiny"
