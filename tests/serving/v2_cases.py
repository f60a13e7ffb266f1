# SPDX-License-Identifier: Apache-2.0
"""Cases for the V2 runner alone; `test_v2.py` runs them in a process of its own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.engines import ON_V2, bound_drafter_of, engine, generate, runner_of
from vllm_mtp.block import PAD_SLOT, fit_blocks

pytestmark = pytest.mark.skipif(not ON_V2, reason="needs test_v2.py's environment")

PROMPTS = [[(7 * i + j) % 512 for i in range(20 + j)] for j in range(3)]


def spec_for(folder: Path, **settings: object) -> dict[str, object]:
    return {"method": "mtp_placeholder", "model": str(folder), **settings}


def test_it_is_the_v2_runner_with_our_speculator(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vllm_mtp.serving.v2 import MTPPlaceholderSpeculator

    with engine(tiny_targets["llama"], spec_for(tiny_drafter("llama", "own-1"))) as llm:
        assert isinstance(runner_of(llm), GPUModelRunner)
        assert type(runner_of(llm).speculator) is MTPPlaceholderSpeculator
        assert runner_of(llm).speculator.draft_attn_layer_names == set()


@pytest.fixture
def gumbel_cache_without_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter cannot run the kernel's store of the draft logits ("mask
    has unsupported dtype"); keep them with torch indexing instead."""
    from vllm_mtp.serving import v2

    stock: Callable[..., torch.Tensor] = v2.gumbel_sample

    def sample(logits: torch.Tensor, rows: torch.Tensor, *args: Any, **kw: Any) -> Any:
        cache, column = kw.pop("logits_cache"), kw.pop("logits_cache_col")
        # What the real kernel asks for.
        assert (logits.dtype, column.dim()) == (cache.dtype, 0)
        assert cache.shape[-1] == logits.shape[-1]
        live = rows >= 0
        cache[rows[live].long(), column] = logits[live].to(cache.dtype)
        return stock(logits, rows, *args, **kw)

    monkeypatch.setattr(v2, "gumbel_sample", sample)
    return


@pytest.mark.usefixtures("gumbel_cache_without_triton")
def test_a_drafter_that_is_the_target_is_accepted_when_sampling(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    spec = spec_for(
        tiny_drafter("llama", "shared-1"), draft_sample_method="probabilistic"
    )
    with engine(tiny_targets["llama"], spec) as llm:
        run = generate(llm, PROMPTS, 12, temperature=1.0, seed=3)
    assert run.counts.accepted_per_place[0] == run.counts.drafts > 10


@pytest.mark.usefixtures("gumbel_cache_without_triton")
def test_draft_distributions_cover_the_targets_vocabulary(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    """Reduced vocabulary: the tokens that cannot be drafted have probability 0.

    With temperature 0, since the interpreter cannot run vLLM's kernel that draws
    again after a rejection ("'NoneType' object has no attribute 'dtype'").
    """
    spec = spec_for(tiny_drafter("llama", "mixed"), draft_sample_method="probabilistic")
    with engine(tiny_targets["llama"], spec) as llm:
        run = generate(llm, PROMPTS, 12)
        cached = runner_of(llm).speculator.draft_logits
    assert run.counts.accepted_tokens > 0
    used = cached.flatten(1).ne(0).any(dim=1)  # rows of requests that drafted
    assert used.sum() == len(PROMPTS)
    finite = cached[used].isfinite()
    assert finite[:, :, ::2].all()  # `ALL_OPTIONS` drafts even token ids
    assert not finite[:, :, 1::2].any()


def test_a_limit_that_vllm_lowers_after_start_is_kept(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    """With ``max_model_len=-1`` vLLM fits the limit to the cache later on."""
    with engine(
        tiny_targets["llama"], spec_for(tiny_drafter("llama", "shared-4"))
    ) as llm:
        speculator = runner_of(llm).speculator
        speculator._limit = 64
        prefix_lens = torch.tensor([62])
        speculator.idx_mapping[0] = 0
        blocks = fit_blocks(prefix_lens, 4, speculator._limit, 64)
        slots = speculator._scratch_slots(blocks)
    assert (slots[0, 2:] == PAD_SLOT).all()
    assert blocks.positions.tolist() == [[62, 63, 63, 63]]


def test_boundary_hidden_is_the_last_valid_tokens_after_rejections(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    """The LM head on that row must give the anchor, rejections or not."""
    with engine(tiny_targets["llama"], spec_for(tiny_drafter("llama", "mixed"))) as llm:
        bound = bound_drafter_of(llm)
        forward, seen = bound.forward, []

        def recorded(anchors: Any, positions: Any, boundary: Any) -> Any:
            best = bound.target.logits(boundary).argmax(dim=-1)
            seen.append((anchors.clone(), best))
            return forward(anchors, positions, boundary)

        bound.forward = recorded
        run = generate(llm, PROMPTS, 16)
    assert run.counts.accepted_tokens < run.counts.draft_tokens
    assert len(seen) > 5
    for anchors, best in seen:
        assert anchors.tolist() == best.tolist()
