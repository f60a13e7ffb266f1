# SPDX-License-Identifier: Apache-2.0
"""`propose` never waits for the device, on either runner."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.engines import ON_V2, engine, generate, runner_of
from tests.serving.host_syncs import PACKAGE, host_syncs, watch_propose

PROMPTS = [[(7 * i + j) % 512 for i in range(20 + j)] for j in range(3)]


def run_as(filename: str, code: str) -> list[str]:
    """What is found in code that claims to stand in ``filename``."""
    x = torch.tensor([2, 0, 1])
    with torch.inference_mode(), host_syncs() as found:  # as in `propose`
        exec(compile(code, filename, "exec"), {"x": x, "torch": torch})
    return found


@pytest.mark.parametrize(
    "code",
    [
        "x[0].item()",
        "int(x[0])",
        "float(x.sum())",
        "if x.any(): pass",
        "x.tolist()",
        "x.numpy()",
        "x.cpu()",
        "x.nonzero()",
        "x[x > 0]",
        "x[x > 0] = 1",
        "x.repeat_interleave(x)",
        "torch.where(x > 0)",
        "torch.masked_select(x, x > 0)",
        "torch.unique(x)",
        "torch.equal(x, x)",
        "torch.tensor([1])",
        "list(range(x[0]))",
    ],
)
def test_every_kind_of_sync_is_found(code: str) -> None:
    assert run_as(f"{PACKAGE}/serving/made_up.py", code)
    assert not run_as("/elsewhere/made_up.py", code)


@pytest.mark.parametrize(
    "code",
    [
        "x.clamp(max=1) + torch.arange(3, device=x.device)",
        "x.repeat_interleave(2, dim=0)",
        "torch.where(x > 0, x, 0)",
        "x.masked_fill_(x > 0, 7)",
        "x[x]",
        "x.clone()[:2].copy_(x[1:])",
    ],
)
def test_nothing_else_is(code: str) -> None:
    assert run_as(f"{PACKAGE}/serving/made_up.py", code) == []


def host_tensors(values: tuple[Any, ...]) -> Iterator[Any]:
    """What vLLM keeps on the host: it says so in the attribute's name."""
    for value in values:
        for name, attribute in getattr(value, "__dict__", {}).items():
            if "cpu" in name:
                yield attribute


@pytest.mark.engine
@pytest.mark.parametrize(
    "name",
    [
        "mixed-windowed",
        "chain-all",
        pytest.param("shared-4", marks=pytest.mark.slow),
        pytest.param("own-some", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_propose_does_not_wait(
    method: str,
    name: str,
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
) -> None:
    spec = {
        "method": "mtp_placeholder",
        "model": str(tiny_drafter("llama", name)),
        "draft_sample_method": method,
    }
    with engine(tiny_targets["llama"], spec) as llm:
        runner = runner_of(llm)
        drafter = runner.speculator if ON_V2 else runner.drafter
        positions, sizes = watch_propose(drafter, host_tensors)
        generate(llm, PROMPTS, 8, temperature=float(method == "probabilistic"), seed=1)
    assert positions == []
    assert len(sizes) > 2
    assert max(sizes) == len(PROMPTS)
