# SPDX-License-Identifier: Apache-2.0
"""What vLLM's own client is told to send."""

from typing import Any

import pytest

from vllm_mtp.bench import client
from vllm_mtp.bench.plan import auto_side, drafter_sides
from vllm_mtp.errors import MTPError

FOUND = {
    "errors": [""],
    "output_throughput": 10.0,
    "total_output_tokens": 8,
    "duration": 0.8,
    "median_ttft_ms": 1.0,
    "median_tpot_ms": 2.0,
    "generated_texts": ["text"],
}


def options_of(monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    """The client's options, as vLLM reads them."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    given: list[str] = []

    def bench_serve(*arguments: str) -> dict[str, Any]:
        given.extend(arguments)
        return FOUND

    monkeypatch.setattr(client, "bench_serve", bench_serve)
    client.run_load("http://here", "/targets/tiny", ["a"], 1, 8, **more)
    return parser.parse_args(given)


def test_a_request_asks_for_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    two, _ = drafter_sides("ours", "/d/ours", [2, 4], per_request=True)
    options = options_of(monkeypatch, extra_body=two.extra_body)
    assert options.extra_body == {"vllm_xargs": {"num_speculative_tokens": 2}}
    auto = auto_side("ours", "/d/ours")
    options = options_of(monkeypatch, extra_body=auto.extra_body)
    assert options.extra_body is None


def test_a_request_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = FOUND | {"errors": ["", "no such request"]}
    monkeypatch.setattr(client, "bench_serve", lambda *_: found)
    with pytest.raises(MTPError, match="1 requests failed, first: no such"):
        client.run_load("http://here", "/targets/tiny", ["a"], 1, 8)
