# SPDX-License-Identifier: Apache-2.0
"""Blocks weighted by whether greedy decoding would run them."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_spec.goldens import fill_weights
from tests.tiny_targets import VOCAB_SIZE
from vllm_mtp.drafter.heads import pick_greedy
from vllm_mtp.drafter.layout import IGNORE_LABEL
from vllm_mtp.evaluation.offline import evaluate_texts
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import load_frozen
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.torch_host.texts import TextBlocks, draft_texts
from vllm_mtp.training.anchors import choose_window, generator_for
from vllm_mtp.training.loss_module import LossModule, LossPlan
from vllm_mtp.training.objective import Objective
from vllm_mtp.training.walk import visited

K = 3
Texts = dict[str, list[dict[str, Any]]]
KINDS: dict[str, dict[str, Any]] = {
    "whole target": {"layers": "shared:all", "markov_rank": 4},
    "reduced": {
        "layers": "shared:0-2,own:3",
        "draft_vocab_size": 200,
        "markov_rank": 4,
    },
    "chain": {"layers": "own:2,3", "chain": True},
}
OBJECTIVES = {
    "ce": Objective(),
    "all": Objective(0.5, 0.5, 0.5, 8, 2.0),
    "exact, acceptance": Objective(0.0, 0.0, 1.0, 0, acceptance=0.5),
}


@pytest.fixture(scope="module")
def host(tiny_llama: Path) -> HFTarget:
    return HFTarget(load_frozen(tiny_llama, "float32", "cpu"))


def module_of(host: HFTarget, folder: Path, kind: str, **plan: Any) -> LossModule:
    options = {"dtype": "float32"} | KINDS[kind]
    layers, size = options.pop("layers"), options.get("draft_vocab_size")
    tokens = range(size) if size else None
    drafter = new_drafter(folder, layers, K, DrafterOptions(**options), tokens)
    if drafter.markov is not None:
        fill_weights(drafter.markov, 0.3, salt="walk ")
    plan = {"anchors_per_text": 64} | plan
    return LossModule(drafter.float(), host, LossPlan(**plan))


def text_of(module: LossModule, size: int, index: int) -> dict[str, Any]:
    """A prompt of 4 tokens, and an answer of which some is what the drafter drafts."""
    tokens = torch.arange(5) * 37 + 11 * index
    right = index
    while len(tokens) < size:
        states = module.host.encode(tokens, streams=module.streams)
        block = TextBlocks(tokens, states, torch.tensor([len(tokens) - 1]))
        with torch.no_grad():
            (drafted,), _ = draft_texts(module.bound, [block], K, pick_greedy)
        right = (right + 1) % (K + 1)
        other = (tokens[-1:] * 7 + 251) % VOCAB_SIZE
        tokens = torch.cat([tokens, drafted[:right], other])
    tokens = tokens[:size]
    spans = [[4, size]]
    return {"index": index, "input_ids": tokens, "loss_spans": spans, "category": ""}


class TestWindow:
    @given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 1000))
    def test_they_follow_each_other(self, size: int, count: int, seed: int) -> None:
        possible = torch.arange(size) * 3
        chosen = choose_window(possible, count, generator_for(seed)).tolist()
        assert chosen == sorted(set(chosen))
        assert len(chosen) == min(size, count)
        gaps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
        if sum(gap > 3 for gap in gaps):  # it goes on at the beginning
            assert sum(gap > 3 for gap in gaps) == 1
            assert (chosen[0], chosen[-1]) == (0, 3 * size - 3)
        assert chosen == choose_window(possible, count, generator_for(seed)).tolist()

    def test_none_is_taken_more_often_than_others(self) -> None:
        counts: Counter[int] = Counter()
        for step in range(3000):
            window = choose_window(torch.arange(30), 6, generator_for(0, step))
            counts.update(window.tolist())
        assert set(counts) == set(range(30))
        assert all(abs(count - 600) < 120 for count in counts.values())


@st.composite
def runs_of_anchors(draw: Any) -> list[list[tuple[int, int]]]:
    """Of each text, anchors and how many drafts are right there."""
    one = st.tuples(st.integers(1, 3), st.integers(0, K))
    texts = draw(
        st.lists(st.lists(one, min_size=1, max_size=12), min_size=1, max_size=3)
    )
    placed = []
    for text in texts:
        where, found = 0, []
        for gap, right in text:
            where += max(gap - 1, 1)  # mostly right behind the one before
            found.append((where, right))
        placed.append(found)
    return placed


@given(runs_of_anchors())
def test_a_walk_is_that_of_decoding(texts: list[list[tuple[int, int]]]) -> None:
    expected: list[bool] = []
    for text in texts:
        place, previous = 0, -1
        for where, right in text:
            if where != previous + 1:
                place = where  # in a new row of anchors it begins anew
            expected.append(where == place)
            if where == place:
                place = where + right + 1
            previous = where
    labels = torch.arange(K).expand(sum(map(len, texts)), K).clone()
    right = torch.tensor([right for text in texts for _, right in text])
    # A right draft behind a wrong one is none, and no draft is right behind the end.
    drafted = labels + (torch.arange(K) == right[:, None]).long()
    labels[right == 1, 1:] = IGNORE_LABEL
    states: Any = None
    blocks = [
        TextBlocks(torch.zeros(0), states, torch.tensor([where for where, _ in text]))
        for text in texts
    ]
    assert visited(blocks, drafted, labels).tolist() == expected


@pytest.fixture(scope="module")
def texts(host: HFTarget, tiny_llama: Path) -> Texts:
    """Two of each kind."""
    found = {}
    for kind in KINDS:
        module = module_of(host, tiny_llama, kind)
        found[kind] = [text_of(module, size, i) for i, size in enumerate((24, 12))]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_visits_what_simulated_decoding_drafts(
    kind: str, host: HFTarget, tiny_llama: Path, texts: Texts
) -> None:
    module = module_of(host, tiny_llama, kind, unvisited_weight=0.5)
    with torch.no_grad():
        found = module(texts[kind], step=0)["visited"].item()
    rows = [text | {"input_ids": text["input_ids"].tolist()} for text in texts[kind]]
    total = evaluate_texts(module.bound, rows, K).total
    drafts, anchors = total.simulated.drafts, total.teacher_forced.drafts
    assert found == pytest.approx(drafts / anchors)
    assert drafts < anchors


@pytest.mark.parametrize(
    ("kind", "objective", "own_part"),
    [
        ("whole target", "exact, acceptance", 0.0),
        ("whole target", "ce", 0.5),
        ("reduced", "all", 0.0),
        ("reduced", "exact, acceptance", 0.0),
        ("chain", "ce", 0.0),
    ],
)
def test_the_others_count_as_much_as_is_said(
    kind: str,
    objective: str,
    own_part: float,
    host: HFTarget,
    tiny_llama: Path,
    texts: Texts,
) -> None:
    """Beside the loss of visited blocks alone, over the counts of all."""
    plan: dict[str, Any] = {
        "objective": OBJECTIVES[objective],
        "anchors_per_text": 12,
        "on_policy_weight": own_part,
    }
    module = module_of(host, tiny_llama, kind, unvisited_weight=0.25, **plan)
    rows = texts[kind]
    found = gradients(module, module(rows, step=2)["loss"])
    blocks = [module.blocks(text, step=2) for text in rows]
    plain = LossModule(module.drafter, host, LossPlan(**plan))
    everything = gradients(module, plain.loss_of(blocks)["loss"])
    whole = module.labels_of_step(rows, 2, lambda counts: counts)
    assert whole.blocks == sum(len(b.prefix_lens) for b in blocks) == 12 + 7
    kept = [decoded(module, text) for text in blocks]
    assert sum(map(len, kept)) < whole.blocks
    some = [b._replace(prefix_lens=b.prefix_lens[i], ends=b.ends[i]) for b, i in
            zip(blocks, kept, strict=True)]  # fmt: skip
    alone = gradients(module, plain.loss_of(some, whole)["loss"])
    for name, value in found.items():
        expected = 0.75 * alone[name] + 0.25 * everything[name]
        # Gradients of placeholders go up to 29, where float32 is that much coarser.
        largest = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(value, expected, atol=1e-5 * largest, rtol=1e-4)
    assert len(found) > 1


def gradients(module: LossModule, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def decoded(module: LossModule, blocks: TextBlocks) -> list[int]:
    """Which blocks of a text decoding runs, by drafting behind one after the other."""
    seen, place = [], 0
    for index, where in enumerate(blocks.prefix_lens.tolist()):
        if index and where != int(blocks.prefix_lens[index - 1]) + 1:
            place = where
        if where < place:
            continue
        one = blocks._replace(prefix_lens=blocks.prefix_lens[index : index + 1])
        counts = module_accepts(
            module, one._replace(ends=blocks.ends[index : index + 1])
        )
        seen.append(index)
        place = where + counts + 1
    return seen


def module_accepts(module: LossModule, block: TextBlocks) -> int:

    with torch.no_grad():
        drafted, _ = draft_texts(module.bound, [block], K, pick_greedy)
    return int((drafted == block.labels(K)).long().cumprod(1).sum())


def test_parts_of_a_step_sum_up_to_all_of_it(
    host: HFTarget, tiny_llama: Path, texts: Texts
) -> None:
    objective = OBJECTIVES["exact, acceptance"]
    plan = {"objective": objective, "anchors_per_text": 12, "unvisited_weight": 0.3}
    found = []
    for cut in (False, True):
        module = module_of(host, tiny_llama, "reduced", **plan)
        rows = texts["reduced"]
        whole = module.labels_of_step(rows, 4, lambda counts: counts)
        parts = [[text] for text in rows] if cut else [rows]
        each = [module(part, step=4, whole=whole) for part in parts]
        sums = {key: sum(one[key] for one in each) for key in each[0]}
        of_weights = gradients(module, sums["loss"])  # type: ignore[arg-type]
        found.append(
            {k: torch.as_tensor(v).detach() for k, v in sums.items()} | of_weights
        )
    assert {"loss", "tv", "acceptance", "visited"} <= found[0].keys()
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_what_was_cast_for_the_choice_is_cast_again_for_the_loss(
    host: HFTarget, tiny_llama: Path, texts: Texts
) -> None:
    """A copy of a weight that was made without a graph would leave it untrained."""
    found = []
    for weight in (1.0, 0.5):
        module = module_of(host, tiny_llama, "reduced", unvisited_weight=weight)
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(texts["reduced"], step=0)["loss"]
        found.append(gradients(module, loss))
    assert found[0].keys() == found[1].keys() >= {"drafter.markov.unembed.weight"}


def test_a_whole_weight_changes_nothing(
    host: HFTarget, tiny_llama: Path, texts: Texts
) -> None:
    plain = module_of(host, tiny_llama, "reduced", anchors_per_text=6)
    text = texts["reduced"][0]
    parts = plain([text], step=3)
    assert set(parts) == {"loss", "ce"}
    assert (plain.blocks(text, 3).prefix_lens.diff() > 1).any()
