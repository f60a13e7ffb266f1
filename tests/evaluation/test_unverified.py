# SPDX-License-Identifier: Apache-2.0
"""Drafts that are taken: against plain decoding, one text at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec.goldens import fill_weights
from tests.tiny_targets import make_tiny
from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.heads import pick_greedy_with_scores
from vllm_mtp.errors import MTPError
from vllm_mtp.evaluation.merged import in_two_forwards, is_mergeable, merged
from vllm_mtp.evaluation.offline import greedy_continuation
from vllm_mtp.evaluation.unverified import (
    Answer,
    Rule,
    answer,
    compare,
    read_prompts,
    takes_several,
)
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.torch_host.texts import TextBlocks, draft_texts, streams_of

K = 3
# Of unlike lengths, so that texts are padded from the start.
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]
KINDS: dict[str, dict[str, Any]] = {
    "whole target": {"layers": "shared:all", "markov_rank": 4},
    "few tokens": {"layers": "shared:all", "draft_vocab_size": 40},
    "own": {"layers": "own:0,3", "boundary_hidden": "all", "draft_vocab_size": 300},
    "chain": {"layers": "own:3", "chain": True},
    "streams": {"layers": "own:1,3", "boundary_hidden": "all", "boundary_of": "bound"},
}


@pytest.fixture(scope="module")
def host(tiny_llama: Path) -> HFTarget:
    return host_of(tiny_llama)


def host_of(folder: Path) -> HFTarget:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return HFTarget(model.eval().requires_grad_(False))


def drafter_of(host: HFTarget, folder: Path, kind: str) -> BoundDrafter:
    options = {"dtype": "float32"} | KINDS[kind]
    layers, size = options.pop("layers"), options.get("draft_vocab_size")
    drafter = new_drafter(
        folder, layers, K, DrafterOptions(**options), range(size) if size else None
    )
    fill_weights(torch.nn.ModuleList(drafter.layers), 0.1, salt="unverified ")
    return BoundDrafter(drafter.requires_grad_(False), host)


@torch.no_grad()
def plainly(
    bound: BoundDrafter, prompt: Sequence[int], rule: Rule, max_tokens: int, stop: int
) -> Answer:
    """The same by running the target over the whole text each time."""
    host = bound.target
    assert isinstance(host, HFTarget)
    text, made, end = list(prompt), Answer(), len(prompt) + max_tokens

    def log_p() -> torch.Tensor:
        hidden = host.encode(torch.tensor(text)).hidden[-1]
        return host.logits(hidden[None])[0].log_softmax(-1)

    def add(token: int, is_draft: bool) -> None:
        scores = log_p()
        given_up = float(scores.max() - scores[token])
        made.add(token, given_up, is_draft, int(scores.argmax()) == token)
        text.append(token)

    add(int(log_p().argmax()), False)
    while len(text) < end and stop not in text[len(prompt) :]:
        known = torch.tensor(text)
        states = host.encode(known[:-1], streams=streams_of(bound.drafter.config))
        blocks = TextBlocks(known, states, torch.tensor([len(text) - 1]))
        drafts, scores = draft_texts(
            bound, [blocks], K, pick_greedy_with_scores, whole_blocks=True
        )
        assert scores is not None
        config = bound.drafter.config
        sure = int(config.shares_whole_target and config.draft_vocab_size is None)
        taken = int(rule.num_taken(scores, sure)[0])
        for token in drafts[0, :taken].tolist():
            add(token, True)
        add(int(log_p().argmax()), False)
        made.steps.append(taken + 1)
    made.cut(made.end(max_tokens, [stop]) or max_tokens)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [Rule("probability", 0.25), Rule("entropy", 6.0)])
def test_texts_go_on_as_each_would_alone(
    kind: str, rule: Rule, host: HFTarget, tiny_llama: Path
) -> None:
    """Drafts are taken here and there, and some answers end before others."""
    bound = drafter_of(host, tiny_llama, kind)
    prompts = read_prompts(host, PROMPTS, streams_of(bound.drafter.config))
    free = answer(prompts, 14, (), bound, rule)
    stop = free[0].token_ids[6]
    found = answer(prompts, 14, [stop], bound, rule)
    expected = [plainly(bound, prompt, rule, 14, stop) for prompt in PROMPTS]
    for one, wanted in zip(found, expected, strict=True):
        assert one.token_ids == wanted.token_ids
        assert one.is_draft == wanted.is_draft
        assert one.agrees == wanted.agrees
        assert one.steps == wanted.steps
        assert one.given_up == pytest.approx(wanted.given_up, abs=1e-4)
    steps = {step for one in free for step in one.steps}
    assert len(steps) > 1
    assert len(found[0].token_ids) <= 7


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_without_a_drafter_the_answers_are_the_targets(
    family: str, tmp_path: Path
) -> None:
    host = host_of(make_tiny(family, tmp_path / "target"))
    several = takes_several(host)
    assert several == (family == "llama")  # the other has sliding windows
    batches = [PROMPTS] if several else [[prompt] for prompt in PROMPTS]
    found = [a for batch in batches for a in answer(read_prompts(host, batch), 60, ())]
    for prompt, one in zip(PROMPTS, found, strict=True):
        states = host.encode(torch.tensor(prompt))
        own = greedy_continuation(host, states, len(prompt), 60).tolist()
        assert one.token_ids == own
        assert one.steps == [1] * 59
    same = compare(found, found)
    assert (same.tokens_per_forward, same.agreed, same.drafts_taken) == (1, 1, 0)
    assert (same.same_start, same.same_positions, same.same_answers) == (1, 1, 1)


def test_a_rule_takes_the_first_drafts_that_pass() -> None:
    p = torch.tensor([[0.9, 0.5, 0.9], [0.9, 0.9, 0.4], [0.4, 1.0, 1.0]])
    scores = torch.stack([p, 1 - p], dim=-1).log()
    assert Rule("probability", 0.8).num_taken(scores, 1).tolist() == [1, 2, 3]
    best = torch.maximum(p, 1 - p)
    assert Rule("probability", 0.8).num_taken(scores).tolist() == [1, 2, 0]
    assert Rule("probability", 0.0).num_taken(scores).tolist() == [3, 3, 3]
    assert Rule("probability", 1.0).num_taken(scores).tolist() == [0, 0, 0]
    entropy = -(best * best.log() + (1 - best) * (1 - best).clamp(min=1e-9).log())
    bound = float(entropy[1, :2].sum()) + 1e-4
    assert Rule("entropy", bound).num_taken(scores).tolist() == [1, 2, 0]
    assert Rule("entropy", 0.0).num_taken(scores).tolist() == [0, 0, 0]
    assert Rule("entropy", 0.4).num_taken(scores, 2).tolist() == [3, 2, 3]
    with pytest.raises(MTPError, match="probability: got a bound of 1.1, expected 0"):
        Rule("probability", 1.1)
    with pytest.raises(MTPError, match="entropy: got a bound of nan"):
        Rule("entropy", float("nan"))


def test_answers_are_compared_with_the_targets_own() -> None:
    own = [Answer([1, 2, 3, 4]), Answer([5, 6])]
    made = [
        Answer(
            [1, 9, 3], [0, 0.5, 0], [False, True, False], [True, False, True], [2, 1]
        ),
        Answer([5, 6], [0, 0], [False, True], [True, True], [3]),
    ]
    found = compare(made, own)
    assert found.tokens_per_forward == 2.0
    assert (found.drafts_taken, found.drafts_agreed, found.given_up) == (2, 0.5, 0.25)
    assert found.agreed == 4 / 5
    assert found.same_start == 3 / 6
    assert found.same_positions == 4 / 6
    assert found.same_answers == 0.5


class TestMerged:
    def test_masks_draft_behind_the_bonus_token(self) -> None:
        """Three rows: the first is the target's own, two are masks."""
        lengths = [[3, 1, 1, 2, 3, 1], [2, 1]]
        two = in_two_forwards(lengths, 3)
        # Anchors 0 and 4 of the first answer, 0 of the second.
        assert two.tokens_per_step == pytest.approx(((3 + 1) + (3 + 1) + (2 + 1)) / 3)
        assert (two.forwards_per_step, two.rows_per_step) == (2, 7)
        one = merged(lengths, 3)
        # Anchors 0 (two masks right), 3 (one), 5; and 0 of the second (one).
        assert one.tokens_per_step == (3 + 2 + 1 + 2) / 4
        assert (one.forwards_per_step, one.rows_per_step) == (1, 9)
        assert one.tokens_per_forward == 2.0 > two.tokens_per_forward
        assert one.rows_per_token == 4.5
        assert two.rows_per_token == pytest.approx(7 / (11 / 3))

    def test_a_drafter_with_layers_of_its_own_has_none(
        self, host: HFTarget, tiny_llama: Path
    ) -> None:
        whole = drafter_of(host, tiny_llama, "whole target").drafter.config
        assert is_mergeable(whole)
        assert not is_mergeable(drafter_of(host, tiny_llama, "own").drafter.config)
        some = whole.model_copy(update={"draft_vocab_size": 64})
        assert not is_mergeable(some)
