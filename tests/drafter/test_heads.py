# SPDX-License-Identifier: Apache-2.0
"""How a drafted token is chosen, and how sure the drafter is of it."""

import pytest
import torch

from vllm_mtp.drafter.heads import (
    pick_greedy,
    pick_with_probability,
    sure_lengths,
)


def test_the_first_of_equals_is_chosen() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    for pick in (pick_greedy, pick_with_probability):
        assert pick(logits.bfloat16())[0].tolist() == [1, 0]


def test_the_probability_of_the_best_token() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
    index, probability = pick_with_probability(logits)
    assert torch.equal(index, logits.argmax(-1))
    assert probability.shape == (5, 1)
    torch.testing.assert_close(probability[:, 0], logits.softmax(-1).amax(-1))
    _, of_half = pick_with_probability(logits.bfloat16())
    assert of_half.dtype == torch.float32
    torch.testing.assert_close(of_half, probability, rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    ("least", "lengths"),
    [(0.0, [3, 3, 3]), (0.1, [3, 1, 0]), (0.5, [2, 1, 0]), (1.0, [1, 0, 0])],
)
def test_a_block_is_kept_as_long_as_all_of_it_is_likely(
    least: float, lengths: list[int]
) -> None:
    # The last token of the second block is likely, but not behind the one before it.
    probabilities = torch.tensor([[1.0, 0.5, 0.5], [0.9, 0.1, 1.0], [0.05, 1.0, 1.0]])
    assert sure_lengths(probabilities, least) == lengths
