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
    """Probability of each token at the answer's second place. ``[V]`` float64."""
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
    tokens: list[int] = []
    for start in range(0, num_samples, BATCH):
        outputs = llm.generate(
            [{"prompt_token_ids": PROMPT}] * BATCH,
            [
                SamplingParams(
                    temperature=1.0,
                    seed=seed,
                    max_tokens=3,
                    ignore_eos=True,
                    detokenize=False,
                )
                for seed in range(start, start + BATCH)
            ],
            use_tqdm=False,
        )
        tokens += [output.outputs[0].token_ids[1] for output in outputs]
    return tokens


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
    rejected = counts.drafts - counts.accepted_per_place[0]
    assert counts.accepted_per_place[0] > 0
    assert rejected > NUM_SAMPLES // 4
    assert chi_squared(tokens, second_token(tiny_targets["llama"], 1.0)) < LIMIT
    # It would see a target that is a little cooler.
    assert chi_squared(tokens, second_token(tiny_targets["llama"], 0.8)) > LIMIT
