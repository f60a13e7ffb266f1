# SPDX-License-Identifier: Apache-2.0
"""Sampled requests: vLLM's rejection sampler must see the right distributions."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.serving.engines import engine, generate
from vllm_mtp.serving.ledger import CPU_SAMPLING, install, is_installed

pytestmark = pytest.mark.engine

PROMPTS = [[(7 * i + j) % 512 for i in range(20 + j)] for j in range(8)]


def spec_for(folder: Path, **settings: object) -> dict[str, object]:
    return {"method": "mtp_placeholder", "model": str(folder), **settings}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_drafter_that_is_the_target_is_accepted_when_sampling(
    family: str,
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
) -> None:
    """Draft and target distribution are the same, so nothing may be rejected. This
    fails without the ledger's ``cpu-sampling``: vLLM then verifies with another
    temperature than the drafter used."""
    spec = spec_for(
        tiny_drafter(family, "shared-1"), draft_sample_method="probabilistic"
    )
    with engine(tiny_targets[family], spec) as llm:
        assert is_installed(CPU_SAMPLING)
        run = generate(llm, PROMPTS, 40, temperature=1.0, seed=3)
        # Greedy and sampled requests with different settings in one batch.
        cool = generate(llm, PROMPTS, 20, temperature=0.4)
    assert run.counts.accepted_per_position[0] == run.counts.drafts > 100
    assert cool.counts.accepted_per_position[0] == cool.counts.drafts


def test_all_options_with_probabilistic_drafts(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    """Markov correction and reduced vocabulary give full distributions too."""
    spec = spec_for(tiny_drafter("llama", "mixed"), draft_sample_method="probabilistic")
    with engine(tiny_targets["llama"], spec) as llm:
        run = generate(llm, PROMPTS, 40, temperature=1.0)
        greedy = generate(llm, PROMPTS, 20)
    assert all(len(ids) == 40 for ids in run.token_ids)
    assert 0 < run.counts.accepted_tokens < run.counts.draft_tokens
    with engine(tiny_targets["llama"]) as llm:
        assert generate(llm, PROMPTS, 20).token_ids == greedy.token_ids


def test_greedy_drafts_for_sampled_requests(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    """The default: drafts are the most likely tokens, accepted with the target's
    probability. A cold temperature makes this nearly always."""
    with engine(
        tiny_targets["llama"], spec_for(tiny_drafter("llama", "shared-1"))
    ) as llm:
        hot = generate(llm, PROMPTS, 40, temperature=2.0)
        cold = generate(llm, PROMPTS, 40, temperature=0.01)
    assert hot.counts.acceptance_rate < 0.9 < cold.counts.acceptance_rate


def test_fewer_tokens_than_the_drafter_was_made_for(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    spec = spec_for(tiny_drafter("llama", "shared-4"), num_speculative_tokens=2)
    with engine(tiny_targets["llama"], spec) as llm:
        run = generate(llm, PROMPTS, 20)
    assert len(run.counts.accepted_per_position) == 2
    assert run.counts.accepted_per_position[0] == run.counts.drafts


def test_tokens_by_batch_size(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    """vLLM may choose another number of drafts per step, also none."""
    spec = spec_for(
        tiny_drafter("llama", "shared-4"),
        num_speculative_tokens_per_batch_size=[(1, 2, 3), (3, 8, 1)],
    )
    with engine(tiny_targets["llama"], spec) as llm:
        alone = generate(llm, PROMPTS[:1], 20)
        many = generate(llm, PROMPTS, 20)
    with engine(tiny_targets["llama"]) as llm:
        assert generate(llm, PROMPTS, 20).token_ids == many.token_ids
    assert alone.counts.draft_tokens > 2 * alone.counts.drafts
    assert many.counts.draft_tokens < 2 * many.counts.drafts


def test_constraints_are_right_where_vllm_is_wrong() -> None:
    """The replacement against a loop; and whether vLLM still needs it."""
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_only

    metadata = SimpleNamespace(
        all_greedy=False,
        temperature=torch.tensor([0.0, 0.7, 1.5]),
        top_k=torch.tensor([9, 9, 2], dtype=torch.int32),
        top_p=None,
    )
    logits = torch.arange(45.0).view(5, 9) % 7
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)  # the second has no draft
    expected = logits / torch.tensor([1.0, 1.0, 1.5, 1.5, 1.5])[:, None]
    for row in expected[2:]:
        row[row < row.topk(2).values[1]] = -torch.inf

    install(CPU_SAMPLING)
    constrain = rejection_sampler.apply_sampling_constraints
    assert torch.equal(constrain(logits.clone(), ends, metadata), expected)
    assert constrain(torch.empty(0, 9), ends * 0, metadata).shape == (0, 9)

    written = torch.full((5,), 7.0)
    rejection_sampler._expand(written, metadata.temperature, ends, 0, 1)
    assert written.tolist() == [7.0] * 5, (
        "vLLM writes its output now: that reason for 'cpu-sampling' is gone"
    )
    with pytest.raises(RuntimeError, match="numel"):  # the other reason
        apply_top_k_only(torch.empty(0, 9), torch.empty(0, dtype=torch.int32))


def test_top_k_alone_with_steps_that_have_no_draft(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    """Without the ledger's ``cpu-sampling`` the first step ends the engine."""
    with engine(tiny_targets["llama"], spec_for(tiny_drafter("llama", "mixed"))) as llm:
        run = generate(llm, PROMPTS, 12, temperature=1.0, top_k=3)
    assert all(len(ids) == 12 for ids in run.token_ids)
