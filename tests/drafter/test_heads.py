# SPDX-License-Identifier: Apache-2.0
"""How a drafted token is chosen, and how sure the drafter is of it."""

import torch

from vllm_mtp.drafter.heads import (
    MarkovCorrection,
    pick_block,
    pick_greedy,
    pick_greedy_with_scores,
    probability_of_best,
)


def test_the_first_of_equals_is_chosen() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    for pick in (pick_greedy, pick_greedy_with_scores):
        assert pick(logits.bfloat16())[0].tolist() == [1, 0]


def test_the_probability_of_the_best_token() -> None:
    scores = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0)) * 3
    probability = probability_of_best(scores)
    assert probability.shape == (5, 3)
    torch.testing.assert_close(probability, scores.softmax(-1).amax(-1))
    of_half = probability_of_best(scores.bfloat16())
    assert of_half.dtype == torch.float32
    torch.testing.assert_close(of_half, probability, rtol=0.05, atol=0.01)


def test_what_is_not_a_number_is_not_likely() -> None:
    scores = torch.zeros(2, 1, 4)
    scores[0] = torch.nan
    assert probability_of_best(scores).tolist() == [[0.0], [0.25]]


def test_gates_of_all_positions_at_once_choose_as_one_by_one() -> None:
    generator = torch.Generator().manual_seed(1)
    markov = MarkovCorrection(4, 8, 30, 30)
    for weight in markov.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)
    logits = torch.randn(3, 4, 30, generator=generator)
    hidden = torch.randn(3, 4, 8, generator=generator)
    tokens, scores = pick_block(logits, hidden, markov, None, pick_greedy_with_scores)
    previous = logits[:, 0].argmax(-1)
    assert torch.equal(tokens[:, 0], previous)
    for position in range(1, 4):
        corrected = logits[:, position] + markov(previous, hidden[:, position])
        torch.testing.assert_close(scores[:, position], corrected)
        previous = corrected.argmax(-1)
        assert torch.equal(tokens[:, position], previous)
