# SPDX-License-Identifier: Apache-2.0
"""A request's seed holds with drafts that are sampled, whatever else runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.serving.engines import ON_V2, counters, engine
from vllm_mtp.serving.sampling import exponential_noise, with_seeds

PROMPT = [(11 * i) % 512 for i in range(30)]
OTHERS = [[(7 * i + j) % 512 for i in range(20 + 9 * j)] for j in range(5)]
MAX_TOKENS = 10 if ON_V2 else 32
VOCAB_SIZE = 8


def params(seed: int | None, max_tokens: int = MAX_TOKENS) -> SamplingParams:
    return SamplingParams(
        temperature=1.0,
        seed=seed,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
    )


def ask(llm: LLM, requests: Sequence[tuple[list[int], int | None, int]]) -> Any:
    """The answers to prompts with seeds and lengths, asked at once."""
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _, _ in requests],
        [params(seed, length) for _, seed, length in requests],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.engine
def test_the_same_request_gives_the_same_text_alone_and_among_others(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    spec = {
        "method": "mtp_placeholder",
        "model": str(tiny_drafter("llama", "mixed")),
        "draft_sample_method": "probabilistic",
    }
    ours = (PROMPT, 7, MAX_TOKENS)
    # Some end sooner, so that the rows of the batch move.
    others = [
        (prompt, None if number % 2 else number, MAX_TOKENS - 5 * (number % 3) // 2)
        for number, prompt in enumerate(OTHERS)
    ]
    batch = [*others[:3], ours, *others[3:]]
    with engine(tiny_targets["llama"], spec) as llm:
        before = counters(llm)[0]
        (first,), (second,) = ask(llm, [ours]), ask(llm, [ours])
        among, again = ask(llm, batch), ask(llm, batch)
        (another,) = ask(llm, [(PROMPT, 8, MAX_TOKENS)])
        counts = counters(llm)[0] - before
    assert first == second == among[3] == again[3]
    seeded = [row for row, (_, seed, _) in enumerate(batch) if seed is not None]
    assert [among[row] for row in seeded] == [again[row] for row in seeded]
    assert first != another
    # Drafts that were never accepted, or always, would prove nothing.
    assert 0 < counts.accepted_tokens < counts.draft_tokens


def drawn(
    probs: torch.Tensor, seeds: Sequence[int | None], starts: torch.Tensor, k: int = 1
) -> torch.Tensor:
    """``[B, k]`` tokens from ``[B, V]``; rows without a seed are always 0."""
    generators = {
        row: torch.Generator().manual_seed(seed)
        for row, seed in enumerate(seeds)
        if seed is not None
    }
    states = {row: g.get_state() for row, g in generators.items()}
    pick = with_seeds(
        lambda p: (torch.zeros(len(p), dtype=torch.int64), p), generators, starts
    )
    tokens = torch.stack([pick(probs)[0] for _ in range(k)], dim=1)
    # Verification draws from them, in an order of its own.
    assert all(torch.equal(g.get_state(), states[r]) for r, g in generators.items())
    return tokens


def test_a_row_hangs_on_seed_and_position_alone() -> None:
    probs = torch.rand(4, 512, generator=torch.Generator().manual_seed(0)).softmax(-1)
    starts = torch.tensor([5, 60, 7, 200])
    seeds = [3, None, -1, 2**63 + 5]
    batch = drawn(probs, seeds, starts, k=4)
    assert batch[1].tolist() == [0] * 4
    for row, seed in enumerate(seeds):
        alone = slice(row, row + 1)
        assert torch.equal(drawn(probs[alone], [seed], starts[alone], 4), batch[alone])
    # What is drafted again behind a later anchor is drawn alike.
    assert torch.equal(drawn(probs, seeds, starts + 2, 2), batch[:, 2:])
    assert not torch.equal(drawn(probs, [4, None, 1, 6], starts, 4), batch)


@pytest.mark.parametrize("vary", ["seed", "position", "both"])
def test_tokens_are_drawn_from_their_distribution(vary: str) -> None:
    """And those of neighbours do not hang on each other."""
    count = 40_000
    probs = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.05, 0.03, 0.02, 0.0])
    numbers = torch.arange(count)
    seeds = numbers if vary != "position" else torch.full_like(numbers, 7)
    positions = numbers if vary != "seed" else torch.full_like(numbers, 7)
    noise = exponential_noise(seeds, positions, VOCAB_SIZE, torch.float32)
    assert (noise > 0).all()
    assert noise.isfinite().all()
    tokens = (probs / noise).argmax(-1)
    for expected, seen in (
        (probs, tokens.bincount(minlength=VOCAB_SIZE)),
        (
            probs.outer(probs).flatten(),
            (tokens[:-1] * VOCAB_SIZE + tokens[1:]).bincount(minlength=VOCAB_SIZE**2),
        ),
    ):
        possible = expected > 0
        assert seen[~possible].sum() == 0
        wanted = expected[possible] * seen.sum()
        statistic = ((seen[possible] - wanted) ** 2 / wanted).sum()
        degrees = int(possible.sum()) - 1
        # Five standard deviations of chi-squared.
        assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5
