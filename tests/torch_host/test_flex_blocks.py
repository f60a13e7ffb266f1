# SPDX-License-Identifier: Apache-2.0
"""FlexAttention attends as the slices do. On a CPU it has a forward alone."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from checkpoints_spec.goldens import fill_weights
from tests.tiny_targets import VOCAB_SIZE
from tests.torch_host.test_block_attention import HEADS, KV_HEADS, LENS, SIZE, K
from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.torch_host import flex_blocks
from vllm_mtp.torch_host.block_attention import Scoring, attend_blocks, block_slices
from vllm_mtp.torch_host.flex_blocks import attend_blocks_by_flex, flex_mask
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import load_frozen
from vllm_mtp.torch_host.new_drafter import new_drafter
from vllm_mtp.torch_host.texts import TextBlocks, forward_texts


@pytest.mark.filterwarnings("ignore")
def test_a_drafter_drafts_the_same(tiny_llama: Path) -> None:
    model = load_frozen(tiny_llama, "float32", "cpu")
    drafter = new_drafter(tiny_llama, "shared:0,own:2", 3)
    fill_weights(drafter, 0.1, salt="flex ")
    ids = torch.arange(30) * 37 % VOCAB_SIZE
    found = []
    for by_flex in (False, True):
        host = HFTarget(model, by_flex=by_flex)
        bound = BoundDrafter(drafter.float(), host)
        texts = [TextBlocks(ids, host.encode(ids), torch.tensor([4, 5, 21]))]
        with torch.no_grad():
            found.append(forward_texts(bound, texts, 3))
    torch.testing.assert_close(*found)


# `create_block_mask` and an attention that is not compiled warn of their speed.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "windows", [(None, None), (5, None), (None, 32)], ids=["all", "window", "prefix"]
)
@pytest.mark.parametrize(
    "scoring",
    [Scoring(0.4), Scoring(0.4, torch.linspace(-1, 2, HEADS)), Scoring(0.4, None, 1.5)],
    ids=["plain", "sinks", "capped"],
)
def test_same_forward(windows: tuple[int | None, int | None], scoring: Scoring) -> None:
    lens = torch.cat([LENS, torch.tensor([190, 430])])  # something to skip
    generator = torch.Generator().manual_seed(0)
    rows = len(lens) * K
    inputs = [
        torch.randn(heads, rows, SIZE, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    past = torch.randn(2, KV_HEADS, 440, SIZE, generator=generator)
    slices = block_slices(lens, K, HEADS, *windows)
    mask = flex_mask(lens, K, *windows)
    torch.testing.assert_close(
        attend_blocks_by_flex(*inputs, *past, mask, scoring),
        attend_blocks(*inputs, *past, slices, scoring),
    )


class TestCompiled:
    """By what a GPU runs, but for the kernel: dynamo is the same on a CPU."""

    # Prefix lengths of one, of few and of many blocks, over one block of the mask and
    # over several.
    TEXTS = ([20], [9, 14], [300], [90, 140], [200] * 50, [20] * 50, [900] * 33)

    def attend(self, monkeypatch: pytest.MonkeyPatch, most_kinds: int) -> None:
        compiled = flex_blocks._compiled("eager", most_kinds)
        monkeypatch.setattr(flex_blocks, "flex_attention", compiled)
        for text in self.TEXTS:
            for with_grad in (False, True):
                lens = torch.tensor(text)
                query = torch.randn(HEADS, len(text) * K, SIZE)
                own = torch.randn(2, KV_HEADS, len(text) * K, SIZE)
                past = torch.randn(2, KV_HEADS, max(text) + 1, SIZE)
                with torch.set_grad_enabled(with_grad):
                    found = attend_blocks_by_flex(
                        query, *own, *past, flex_mask(lens, K), Scoring(0.4)
                    )
                slices = block_slices(lens, K, HEADS)
                wanted = attend_blocks(query, *own, *past, slices, Scoring(0.4))
                torch.testing.assert_close(found, wanted)

    def test_texts_of_all_lengths_stay_compiled(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.compiler.reset()
        self.attend(monkeypatch, 128)

    def test_what_is_compiled_no_more_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else all scores would be kept, and nobody told."""
        torch.compiler.reset()
        with pytest.raises(FailOnRecompileLimitHit):
            self.attend(monkeypatch, 2)
