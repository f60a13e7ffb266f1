# SPDX-License-Identifier: Apache-2.0
"""A drafter that reads a window of the prefix, in plain torch."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec.goldens import fill_weights
from tests.tiny_targets import VOCAB_SIZE, WINDOW, make_tiny
from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.errors import MTPError, TargetMismatchError
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.torch_host.target_states import TargetStates
from vllm_mtp.torch_host.texts import TextBlocks, anchors_are_exact, forward_texts

TOKENS = torch.arange(400) * 37 % VOCAB_SIZE
# Behind the first, tokens 128 to 255 are skipped; behind the second, none.
PREFIX_LENS = torch.tensor([390, 300])
LAYERS = ["shared:all", "own:0,2", "shared:0,own:3"]
SHAPES: list[tuple[str, dict[str, Any]]] = [
    *((layers, {}) for layers in LAYERS),
    ("shared:0,own:3", {"chain": True}),
    ("shared:0,own:3", {"block_mask": "bidirectional"}),
    ("shared:0,own:3", {"extra_rows": 2}),
    ("own:0,2", {"per_position": True, "input": "boundary"}),
]


class Case(NamedTuple):
    host: HFTarget
    drafter: Drafter
    states: TargetStates

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        """``[B, k, hidden_size]``."""
        bound = BoundDrafter(self.drafter, self.host)
        text = TextBlocks(TOKENS, self.states, PREFIX_LENS)
        return forward_texts(bound, [text], 3)


def case(
    folder: Path, layers: str, prefix_window: int | None = 50, **shape: Any
) -> Case:
    model = AutoModelForCausalLM.from_pretrained(folder)
    host = HFTarget(model.eval().requires_grad_(False))
    options = DrafterOptions(dtype="float32", prefix_window=prefix_window, **shape)
    drafter = new_drafter(folder, layers, 3, options)
    fill_weights(drafter, 0.2, salt="window ")
    return Case(host, drafter, host.encode(TOKENS))


@pytest.mark.parametrize(("layers", "shape"), SHAPES)
@pytest.mark.parametrize(
    ("first", "last", "changed"),
    [
        (0, 127, [True, True]),
        (128, 255, [False, True]),
        (256, 299, [True, True]),
        (300, 389, [True, False]),
        (390, 399, [False, False]),
    ],
)
def test_only_what_the_window_leaves_out_is_not_read(
    tiny_llama: Path,
    layers: str,
    shape: dict[str, Any],
    first: int,
    last: int,
    changed: list[bool],
) -> None:
    windowed = case(tiny_llama, layers, **shape)
    before = windowed.run()
    for values in windowed.states.values.values():
        values[:, first : last + 1] += 1.0
    difference = (windowed.run() - before).abs().amax(-1)
    assert (difference > 1e-4).all(-1).tolist() == changed
    assert (difference > 0).any(-1).tolist() == changed


@pytest.mark.parametrize("layers", LAYERS)
def test_a_short_prefix_is_read_whole(tiny_llama: Path, layers: str) -> None:
    windowed, whole = (case(tiny_llama, layers, window).run() for window in (50, None))
    assert not torch.allclose(windowed[0], whole[0], atol=1e-2)
    torch.testing.assert_close(windowed[1], whole[1], atol=1e-4, rtol=1e-4)


def test_with_a_window_the_target_itself_is_not_exact(tiny_llama: Path) -> None:
    """Its rows cannot be taken from the target's own run."""
    for window, exact in ((None, True), (50, False)):
        drafter = case(tiny_llama, "shared:all", window).drafter
        assert anchors_are_exact(drafter.config) is exact


def test_a_window_is_no_shorter_than_the_targets(tmp_path: Path) -> None:
    folder = make_tiny("mistral", tmp_path / "mistral")
    reason = f"got {WINDOW - 1}.* {WINDOW} or"
    with pytest.raises(TargetMismatchError, match=reason):
        case(folder, "shared:all", WINDOW - 1)
    host, drafter, _ = case(folder, "own:1", None)
    too_short = {"prefix_window": WINDOW - 1}
    drafter.config = drafter.config.model_copy(update=too_short)
    with pytest.raises(TargetMismatchError, match=reason):
        BoundDrafter(drafter, host)
    # The target's own is shorter, so it decides.
    windowed, whole = (case(folder, "own:1", w).run() for w in (WINDOW, None))
    torch.testing.assert_close(windowed, whole)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"block_mask": "bidirectional"}, "block_mask: got 'bidirectional'"),
        ({"extra_rows": 2}, "extra_rows: got 2"),
    ],
)
def test_a_targets_window_counts_rows_one_after_the_other(
    tmp_path: Path, shape: dict[str, Any], reason: str
) -> None:
    folder = make_tiny("mistral", tmp_path / "mistral")
    with pytest.raises(TargetMismatchError, match=f"{reason}, but a target layer.*win"):
        case(folder, "own:1", None, **shape)
    # Layers that read no cache have no window.
    case(folder, "own:1", None, own_attention="block", **shape)


@pytest.mark.parametrize("window", [-3, 2**25])
def test_a_window_holds_a_token(tiny_llama: Path, window: int) -> None:
    with pytest.raises(MTPError, match=f"prefix_window: got {window}, expected"):
        case(tiny_llama, "own:0", window)
