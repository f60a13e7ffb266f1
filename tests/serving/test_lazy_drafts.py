# SPDX-License-Identifier: Apache-2.0
"""Drafts that are computed when they are read."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serving.engines import ON_V2, bound_drafter_of, core_of, engine, generate
from vllm_mtp.serving.lazy_drafts import LateDrafts

VALUES = [[1, 2, 3], [4, 5, 6]]


class Computation:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> list[list[int]]:
        self.calls += 1
        return [list(row) for row in VALUES]


READERS: list[Callable[[LateDrafts], Any]] = [
    list,
    sorted,
    lambda drafts: [row for _, row in zip("ab", drafts, strict=True)],
    lambda drafts: pickle.loads(pickle.dumps(drafts, pickle.HIGHEST_PROTOCOL)),
    lambda drafts: pickle.loads(pickle.dumps({"in": drafts}))["in"],
    lambda drafts: [drafts[0], drafts[1]],
    lambda drafts: drafts[:],
    lambda drafts: [drafts[index] for index in range(len(drafts))],
]


@pytest.mark.parametrize("read", READERS)
def test_whoever_reads_gets_the_values(read: Callable[[LateDrafts], Any]) -> None:
    compute = Computation()
    drafts = LateDrafts(compute)
    assert isinstance(drafts, list)
    assert compute.calls == 0
    found = read(drafts)
    assert type(found) is list
    assert found == VALUES
    assert drafts == VALUES
    assert compute.calls == 1


def test_the_reader_gets_what_goes_wrong() -> None:
    def fail() -> list[list[int]]:
        raise ValueError("no values")

    drafts = LateDrafts(fail)
    for read in (list, len, pickle.dumps):  # and never an empty list
        with pytest.raises(ValueError, match="no values"):
            read(drafts)


@pytest.mark.engine
@pytest.mark.skipif(ON_V2, reason="V2 drafts on the device")
def test_an_engine_drafts_when_the_tokens_have_left(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    spec = {
        "method": "mtp_placeholder",
        "model": str(tiny_drafter("llama", "shared-4")),
    }
    with engine(tiny_targets["llama"], spec) as llm:
        events: list[str] = []
        bound, executor = bound_drafter_of(llm), core_of(llm).model_executor
        watch(events, "sample", executor, "sample_tokens")
        watch(events, "ask", executor, "take_draft_token_ids")
        watch(events, "draft", bound, "forward")
        run = generate(llm, [[7] * 20], 12)
    assert run.counts.accepted_tokens > 0
    steps = "".join(event[0] for event in events).split("s")[1:]
    # With the last step's tokens the request has ended, so nobody drafts for it.
    assert steps == ["ad"] * (len(steps) - 1) + ["a"]


def watch(events: list[str], event: str, owner: Any, name: str) -> None:
    """Note each call before it is made."""
    original = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        events.append(event)
        return original(*args, **kwargs)

    setattr(owner, name, noted)
