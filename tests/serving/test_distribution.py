# SPDX-License-Identifier: Apache-2.0
"""Sampled requests with rejections give the target's distribution, on either runner.

The second token of an answer is the first that a draft can stand for. Its exact
distribution is the target's over all first tokens, which a tiny target can tell.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

from tests.serving.engines import counters, engine
from tests.tiny_targets import VOCAB_SIZE

pytestmark = pytest.mark.engine

PROMPT = [(37 * i) % VOCAB_SIZE for i in range(20)]
NUM_SAMPLES = 512
BATCH = 64
# Of chi-squared with 11 degrees of freedom: passed by chance once in 10,000 times. The
# seeds are fixed, so a run that passed does so again.
LIMIT = 37.4


@torch.no_grad()
def second_token(target: Path, temperature: float) -> torch.Tensor:
    """Probability of each token at the answer's second position. ``[V]`` float64."""
    model = AutoModelForCausalLM.from_pretrained(target).eval()

    def after(texts: torch.Tensor) -> torch.Tensor:
        logits = model(texts).logits[:, -1].double() / temperature
        return logits.softmax(-1)

    prompt = torch.tensor([PROMPT])
    firsts = torch.arange(VOCAB_SIZE)[:, None]
    texts = torch.cat([prompt.expand(VOCAB_SIZE, -1), firsts], dim=1)
    return (after(prompt) @ after(texts))[0]


def groups_of(probabilities: torch.Tensor) -> torch.Tensor:
    """Twelve groups of tokens: even or odd (only even ones are drafted), and from the
    least to the most likely. ``[V]`` int64."""
    order = probabilities.argsort()
    rank = torch.empty_like(order)
    rank[order] = (probabilities[order].cumsum(0) * 6).long().clamp(max=5)
    return rank * 2 + torch.arange(len(order)) % 2


def chi_squared(tokens: list[int], probabilities: torch.Tensor) -> float:
    groups = groups_of(probabilities)
    zeros = torch.zeros(12, dtype=torch.float64)
    expected = zeros.index_add(0, groups, probabilities) * len(tokens)
    seen = torch.bincount(groups[torch.tensor(tokens)], minlength=12)
    return float(((seen - expected) ** 2 / expected).sum())


def draw_second_tokens(llm: LLM, num_samples: int = NUM_SAMPLES) -> list[int]:
    """Of so many answers to the prompt, each with a seed of its own."""
    return [answer[1] for answer in draw_answers(llm, range(num_samples))]


def draw_answers(llm: LLM, seeds: range, num_tokens: int = 3) -> list[list[int]]:
    """An answer to the prompt for each seed."""
    answers: list[list[int]] = []
    for start in range(seeds.start, seeds.stop, BATCH):
        outputs = llm.generate(
            [{"prompt_token_ids": PROMPT}] * BATCH,
            [
                SamplingParams(
                    temperature=1.0,
                    seed=seed,
                    max_tokens=num_tokens,
                    ignore_eos=True,
                    detokenize=False,
                )
                for seed in range(start, start + BATCH)
            ],
            use_tqdm=False,
        )
        answers += [list(output.outputs[0].token_ids) for output in outputs]
    return answers


@pytest.mark.timeout(1400)  # Triton's interpreter samples slowly
@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_the_second_token_is_drawn_as_the_target_draws_it(
    method: str,
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
) -> None:
    spec = {
        "method": "mtp_placeholder",
        "model": str(tiny_drafter("llama", "mixed")),
        "draft_sample_method": method,
    }
    with engine(tiny_targets["llama"], spec, max_num_seqs=BATCH) as llm:
        before = counters(llm)[0]
        tokens = draw_second_tokens(llm)
        counts = counters(llm)[0] - before
    rejected = counts.drafts - counts.accepted_per_position[0]
    assert counts.accepted_per_position[0] > 0
    assert rejected > NUM_SAMPLES // 4
    assert chi_squared(tokens, second_token(tiny_targets["llama"], 1.0)) < LIMIT
    # It would see a target that is a little cooler.
    assert chi_squared(tokens, second_token(tiny_targets["llama"], 0.8)) > LIMIT


MANY_SAMPLES = 20_480
COOLER = 0.95
"""What the large test must notice: a temperature of 0.95 instead of 1."""


def counts_by_position(answers: list[list[int]], groups: torch.Tensor) -> torch.Tensor:
    """How often each position has a token of each group. ``[positions, 12]`` int64."""
    tokens = torch.tensor(answers)
    return torch.stack(
        [groups[position].bincount(minlength=12) for position in tokens.T]
    )


def two_samples(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Chi-squared of two samples of the same size. ``[..., 12]`` to ``[...]``."""
    return ((one - other) ** 2 / (one + other).clamp(min=1)).sum(-1)


def power(target: Path, groups: torch.Tensor, num_trials: int = 500) -> float:
    """Part of the trials in which a target that is a little cooler is noticed."""
    generator = torch.Generator().manual_seed(0)

    def samples(temperature: float) -> torch.Tensor:
        zeros = torch.zeros(12, dtype=torch.float64)
        parts = zeros.index_add(0, groups, second_token(target, temperature))
        drawn = torch.multinomial(
            parts.expand(num_trials, -1), MANY_SAMPLES, True, generator=generator
        )
        return torch.stack([row.bincount(minlength=12) for row in drawn])

    return float((two_samples(samples(1.0), samples(COOLER)) > LIMIT).double().mean())


@pytest.mark.slow
def test_four_positions_are_drawn_as_by_the_target_alone(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    target = tiny_targets["llama"]
    groups = groups_of(second_token(target, 1.0))
    with engine(target, max_num_seqs=BATCH) as llm:
        seeds = range(10**6, 10**6 + MANY_SAMPLES)  # others than the drafter's engine
        plain = counts_by_position(draw_answers(llm, seeds, 4), groups)
    found = power(target, groups)
    assert found > 0.99
    for method in ("greedy", "probabilistic"):
        spec = {
            "method": "mtp_placeholder",
            "model": str(tiny_drafter("llama", "mixed")),
            "draft_sample_method": method,
        }
        with engine(target, spec, max_num_seqs=BATCH) as llm:
            before = counters(llm)[0]
            answers = draw_answers(llm, range(MANY_SAMPLES), 4)
            counts = counters(llm)[0] - before
        assert 0 < counts.accepted_tokens < counts.draft_tokens
        statistics = two_samples(counts_by_position(answers, groups), plain)
        print(
            f"{method}: chi-squared by position {statistics.tolist()}, limit {LIMIT}, "
            f"power {found:.3f}, {counts.drafts} drafts, of which "
            f"{counts.accepted_per_position[0]} had the first position accepted"
        )
        assert (statistics < LIMIT).all()
