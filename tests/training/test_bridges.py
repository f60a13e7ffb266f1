# SPDX-License-Identifier: Apache-2.0
"""Bridges are fitted to the target's streams."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_answers import MakeArguments
from vllm_mtp.drafter.bound import BoundDrafter, Traced
from vllm_mtp.drafter.checkpoint import load_drafter
from vllm_mtp.drafter.layout import possible_anchors
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import load_frozen
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.torch_host.texts import TextBlocks, forward_texts
from vllm_mtp.training.bridges import bridged_layers, fit_bridges
from vllm_mtp.training.run import train

TEXTS: list[dict[str, Any]] = [
    {
        "input_ids": torch.tensor([(31 * i + 7 * n * n) % 512 for n in range(40)]),
        "loss_spans": [[1, 40]],
    }
    for i in range(12)
]


@pytest.fixture(scope="module")
def host(tiny_llama: Path) -> HFTarget:
    return HFTarget(load_frozen(tiny_llama, "float32", "cpu"))


def bound_drafter(
    host: HFTarget, target: Path, layers: str, **options: Any
) -> BoundDrafter:
    options = {"dtype": "float32", "bridges": True} | options
    return BoundDrafter(new_drafter(target, layers, 3, DrafterOptions(**options)), host)


def relative_error(bound: BoundDrafter, index: int) -> float:
    """Of layer ``index``'s output, against the target's stream there."""
    seen: dict[int, torch.Tensor] = {}
    bound.trace = lambda stage, stream: seen.update({stage: stream})
    host, layer = bound.target, bound.drafter.config.layers[index].target_layer
    assert isinstance(host, HFTarget)
    ids = TEXTS[0]["input_ids"]
    states = host.encode(ids, streams=[layer])
    anchors = possible_anchors(TEXTS[0]["loss_spans"], len(ids))
    with torch.no_grad():
        forward_texts(bound, [TextBlocks(ids, states, anchors)], 1)
    bound.trace = None
    wanted = states.streams[layer][anchors]
    return ((seen[index] - wanted).norm() / wanted.norm()).item()


def test_an_untrained_bridge_changes_nothing(host: HFTarget, tiny_llama: Path) -> None:
    with_bridges = bound_drafter(host, tiny_llama, "shared:0,own:3")
    without = bound_drafter(host, tiny_llama, "shared:0,own:3", bridges=False)
    assert relative_error(with_bridges, 1) == pytest.approx(relative_error(without, 1))


def test_extra_rows_are_no_rows_to_fit(host: HFTarget, tiny_llama: Path) -> None:
    """Without layers in between, the anchors' rows are the same with and without."""
    few, more = (
        bound_drafter(host, tiny_llama, "own:2", extra_rows=count) for count in (0, 2)
    )
    fit_bridges(few, TEXTS)
    fit_bridges(more, TEXTS)
    ours, theirs = (bridged_layers(b.drafter)[0].bridge.weight for b in (few, more))
    torch.testing.assert_close(ours, theirs)


def test_where_nothing_is_left_out_the_bridge_stays_as_it_is(
    host: HFTarget, tiny_llama: Path
) -> None:
    bound = bound_drafter(host, tiny_llama, "shared:0,own:1")
    fit_bridges(bound, TEXTS)
    # A ridge of a hundredth, so not quite the identity.
    assert relative_error(bound, 1) < 0.05


@pytest.mark.parametrize("boundary", ["none", "first"])
def test_it_stands_in_for_the_layers_left_out(
    host: HFTarget, tiny_llama: Path, boundary: str
) -> None:
    bound = bound_drafter(
        host, tiny_llama, "shared:0,own:2,3", boundary_hidden=boundary
    )
    before = relative_error(bound, 1)
    fit_bridges(bound, TEXTS)
    assert relative_error(bound, 1) < 0.9 * before
    assert bound.trace is None


def test_rounding_on_the_way_changes_little(host: HFTarget, tiny_llama: Path) -> None:
    """Autocast must not go on with the weights that were there before."""
    errors = []
    for autocast in (False, True):
        bound = bound_drafter(host, tiny_llama, "shared:0,own:2,3")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            fit_bridges(bound, TEXTS)
        errors.append(relative_error(bound, 2))
    assert errors[1] < 1.05 * errors[0]


def test_the_boundary_helps(host: HFTarget, tiny_llama: Path) -> None:
    errors = []
    for boundary in ("none", "first"):
        bound = bound_drafter(
            host, tiny_llama, "shared:0,own:3", boundary_hidden=boundary
        )
        fit_bridges(bound, TEXTS)
        errors.append(relative_error(bound, 1))
    assert errors[1] < errors[0]


def test_a_layer_that_reads_the_first_one_has_nothing_to_bridge(
    host: HFTarget, tiny_llama: Path
) -> None:
    bound = bound_drafter(host, tiny_llama, "own:0,3")
    assert list(bridged_layers(bound.drafter)) == [1]
    seen: list[int] = []
    bound.trace = lambda stage, _: seen.append(stage)
    fit_bridges(bound, TEXTS[:2])
    weight = bound.drafter.state_dict()["layers.0.bridge.weight"]
    assert torch.equal(weight, torch.eye(len(weight)))
    assert Traced.INPUT not in seen, "another's trace is left alone"


def test_training_starts_from_fitted_bridges(
    arguments: MakeArguments,
    tiny_llama: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # vLLM's loggers do not propagate, and an engine started before may have raised
    # their level.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    args = arguments(layers="shared:0,own:3", bridges=True, max_steps=1)
    with caplog.at_level(logging.INFO, "vllm.mtp_placeholder.training"):
        train(args, tiny_llama)
    assert "bridge of layer 1 (reads target layer 3)" in caplog.text
    weights = load_drafter(str(args.output_dir)).state_dict()
    weight = weights["layers.1.bridge.weight"]
    assert (weight - torch.eye(len(weight))).abs().max() > 0.05
