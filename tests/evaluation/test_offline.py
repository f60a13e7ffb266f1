# SPDX-License-Identifier: Apache-2.0
"""Offline acceptance: against decoding itself, token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec.goldens import fill_weights, run_blocks
from tests.tiny_targets import make_tiny_llama
from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.checkpoint import save_drafter
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.errors import DataError, MTPError
from vllm_mtp.evaluation.offline import (
    CategoryResult,
    OfflineResult,
    anchors_of,
    draft_everywhere,
    evaluate_rows,
    evaluate_texts,
    greedy_continuation,
    walk,
)
from vllm_mtp.metrics import AcceptanceCounts
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.torch_host.texts import TextBlocks

# So few tokens that drafts of an untrained drafter are often right by chance.
VOCAB_SIZE = 4
K = 4
PROMPTS = [[(5 * i + n) % VOCAB_SIZE for i in range(n)] for n in (1, 2, 5, 9, 14, 20)]
LAYERS = ["shared:all", "shared:0-1,own:3"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny forwards, to which more threads are a burden."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("target"), vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def target(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=LAYERS)
def drafter(request: pytest.FixtureRequest, folder: Path) -> Drafter:
    """Something of everything where the layers allow it, in float32."""
    options = DrafterOptions(dtype="float32")
    if "own" in request.param:
        options = replace(options, boundary_hidden="all", markov_rank=2)
    made = new_drafter(folder, request.param, K, options)
    fill_weights(made, 0.3, salt="offline ")
    return made.requires_grad_(False)


@pytest.fixture
def bound(drafter: Drafter, target: PreTrainedModel) -> BoundDrafter:
    return BoundDrafter(drafter, HFTarget(target))


class Decoded(NamedTuple):
    token_ids: list[int]
    counts: AcceptanceCounts


def decode(
    bound: BoundDrafter,
    model: PreTrainedModel,
    prompt: Sequence[int],
    k: int,
    max_tokens: int,
    eos: int | None = None,
) -> Decoded:
    """Decode as vLLM's scheduler does: draft, verify, count, and then cut the text."""
    text, longest = [*prompt, *_verified(model, prompt, [])], len(prompt) + max_tokens
    accepted: list[int] = []
    while text[-1] != eos and len(text) < longest:
        last = torch.tensor([len(text) - 1])
        with torch.no_grad():
            blocks = run_blocks(model, bound.drafter, torch.tensor(text), last, k)
        new = _verified(model, text, blocks.tokens[0].tolist())
        accepted.append(len(new) - 1)
        for token in new:
            text.append(token)
            if token == eos or len(text) == longest:
                break
    positions = tuple(len([a for a in accepted if a > i]) for i in range(k))
    return Decoded(text, AcceptanceCounts(len(accepted), k * len(accepted), positions))


def _verified(
    model: PreTrainedModel, text: Sequence[int], drafts: Sequence[int]
) -> list[int]:
    """The drafts that the target would have said, and its own next token."""
    with torch.no_grad():
        logits = model(torch.tensor([[*text, *drafts]])).logits[0, len(text) - 1 :]
    said = logits.argmax(-1).tolist()
    for i, draft in enumerate(drafts):
        if draft != said[i]:
            return said[: i + 1]
    return said


def row(
    prompt: Sequence[int], token_ids: Sequence[int], category: str = "x"
) -> dict[str, Any]:
    return {
        "prompt_id": "0" * 32,
        "category": category,
        "input_ids": list(token_ids),
        "loss_spans": [[len(prompt), len(token_ids)]],
        "finish_reason": "length",
    }


def answers(
    target: PreTrainedModel, bound: BoundDrafter, max_tokens: int = 17
) -> list[dict[str, Any]]:
    """The target's own greedy answers as rows of two categories."""
    return [
        row(prompt, decode(bound, target, prompt, 1, max_tokens).token_ids, category)
        for prompt, category in zip(PROMPTS, "aabbab", strict=True)
    ]


class TestAgainstDecoding:
    @pytest.mark.parametrize(
        ("max_tokens", "eos"),
        [(n, None) for n in range(2, 10)] + [(20, i) for i in range(VOCAB_SIZE)],
    )
    def test_simulated_counts_are_those_of_decoding(
        self,
        bound: BoundDrafter,
        target: PreTrainedModel,
        max_tokens: int,
        eos: int | None,
    ) -> None:
        for prompt in PROMPTS:
            runs = [
                decode(bound, target, prompt, k, max_tokens, eos)
                for k in range(1, K + 1)
            ]
            (text,) = {tuple(run.token_ids) for run in runs}
            if len(text) - len(prompt) < 2:
                continue  # ended by its first token: nothing was drafted
            total = evaluate_texts(bound, [row(prompt, text)], K).total
            assert total.simulated_by_k == tuple(run.counts for run in runs)

    def test_drafts_behind_the_end_do_count(
        self, bound: BoundDrafter, target: PreTrainedModel
    ) -> None:
        """So the comparison above does look at the whole last step."""
        beyond = 0
        for prompt in PROMPTS:
            for max_tokens in range(2, 10):
                counts = decode(bound, target, prompt, K, max_tokens).counts
                # The prefill gives one token, each step its drafts and one more.
                said = 1 + counts.drafts + counts.accepted_tokens
                beyond += said > max_tokens + 1
        assert beyond > 0

    def test_fewer_positions_are_their_own_evaluation(
        self, bound: BoundDrafter, target: PreTrainedModel
    ) -> None:
        rows = answers(target, bound)
        whole = evaluate_texts(bound, rows, K).total
        for k in range(1, K):
            part = evaluate_texts(bound, rows, k).total
            assert part.simulated == whole.simulated_by_k[k - 1]
            assert part.teacher_forced == whole.teacher_forced_by_k[k - 1]

    def test_fewer_positions_of_a_block_that_sees_itself_whole(
        self, folder: Path, target: PreTrainedModel
    ) -> None:
        """Its shorter drafts are not the starts of the longer ones."""
        options = DrafterOptions(dtype="float32", block_mask="bidirectional")  # type: ignore[call-arg]
        made = new_drafter(folder, LAYERS[1], K, options)
        fill_weights(made, 0.3, salt="offline ")
        bound = BoundDrafter(made.requires_grad_(False), HFTarget(target))
        rows = answers(target, bound)
        whole = evaluate_texts(bound, rows, K).total
        differing = 0
        for k in range(1, K):
            part = evaluate_texts(bound, rows, k).total
            assert part.simulated == whole.simulated_by_k[k - 1]
            differing += part.teacher_forced != whole.teacher_forced_by_k[k - 1]
        assert differing, "else the case shows nothing"

    def test_continuation_is_the_targets(self, target: PreTrainedModel) -> None:
        host, text = HFTarget(target), torch.tensor(PROMPTS[-1])
        expected = text.tolist()[:11]
        for _ in range(5):
            expected += _verified(target, expected, [])
        said = greedy_continuation(host, host.encode(text), 11, 5)
        assert said.tolist() == expected[11:]


@pytest.mark.engine
def test_counts_are_vllms(
    folder: Path, target: PreTrainedModel, tmp_path: Path
) -> None:
    """The same answers, decoded by vLLM with the same drafter, counter by counter."""
    from tests.serving.engines import engine, generate

    options = DrafterOptions(dtype="float32")
    drafter = new_drafter(folder, "shared:all", K, options)
    fill_weights(drafter, 0.3, salt="offline ")
    spec = {"method": "mtp_placeholder", "model": str(save_drafter(drafter, tmp_path))}
    bound = BoundDrafter(drafter.requires_grad_(False), HFTarget(target))
    with engine(folder, spec) as llm:
        for flags in ({"max_tokens": 11}, {"max_tokens": 40, "stop_token_ids": [1]}):
            # The engine tests ask for more logprobs than this target has tokens.
            served = generate(llm, PROMPTS, logprobs=None, **flags)
            pairs = zip(PROMPTS, served.token_ids, strict=True)
            rows = [row(prompt, [*prompt, *answer]) for prompt, answer in pairs]
            assert evaluate_texts(bound, rows, K).total.simulated == served.counts
            assert served.counts.drafts > len(PROMPTS)


class TestTeacherForced:
    def test_an_exact_drafter_is_right_everywhere(
        self, folder: Path, target: PreTrainedModel
    ) -> None:
        options = DrafterOptions(dtype="float32")
        exact = new_drafter(folder, "shared:all", 1, options)
        bound = BoundDrafter(exact, HFTarget(target))
        rows = answers(target, bound)
        total = evaluate_texts(bound, rows, 1).total
        assert total.teacher_forced == AcceptanceCounts(6 * 16, 6 * 16, (6 * 16,))
        # Two tokens per step, from the second token on.
        assert total.simulated == AcceptanceCounts(6 * 8, 6 * 8, (6 * 8,))
        rows[0]["input_ids"][-1] = (rows[0]["input_ids"][-1] + 1) % VOCAB_SIZE
        changed = evaluate_texts(bound, rows, 1).total
        assert changed.teacher_forced.accepted_per_position == (6 * 16 - 1,)

    def test_every_anchor_is_verified_as_if_alone(
        self, bound: BoundDrafter, target: PreTrainedModel
    ) -> None:
        """Also in text that is not the target's own: its tokens are the truth."""
        tokens = [(7 * i * i + i // 3) % VOCAB_SIZE for i in range(15)]
        host = HFTarget(target)
        states = host.encode(torch.tensor(tokens))
        truth = tokens + greedy_continuation(host, states, 15, K).tolist()
        accepted = [0] * K
        for n in range(4, 14):
            lens = torch.tensor([n])
            drafts = run_blocks(target, bound.drafter, torch.tensor(tokens), lens, K)
            for i, draft in enumerate(drafts.tokens[0].tolist()):
                if draft != truth[n + 1 + i]:
                    break
                accepted[i] += 1
        total = evaluate_texts(bound, [row(tokens[:4], tokens)], K).total
        assert total.teacher_forced == AcceptanceCounts(10, 10 * K, tuple(accepted))
        assert total.tokens == 11


@pytest.mark.parametrize("blocks_per_forward", [1, 3, 64])
def test_blocks_per_forward_do_not_matter(
    bound: BoundDrafter, target: PreTrainedModel, blocks_per_forward: int
) -> None:
    text = torch.tensor(answers(target, bound)[-1]["input_ids"])
    states = HFTarget(target).encode(text)
    lens = torch.arange(3, len(text) - 1)
    blocks = TextBlocks(text, states, lens)
    drafts = draft_everywhere(bound, blocks, K, blocks_per_forward)
    alone = [run_blocks(target, bound.drafter, text, n[None], K).tokens for n in lens]
    assert drafts.equal(torch.cat(alone))


class TestSpans:
    def test_an_answer_ends_where_its_span_ends(
        self, bound: BoundDrafter, target: PreTrainedModel
    ) -> None:
        """What a user says next is no truth about the target."""
        rows = answers(target, bound)
        expected = evaluate_texts(bound, rows, K)
        for token in range(VOCAB_SIZE):  # one of them is what was drafted
            turn = [token] * 7
            longer = [{**r, "input_ids": r["input_ids"] + turn} for r in rows]
            assert evaluate_texts(bound, longer, K) == expected
        start, end = rows[3]["loss_spans"][0]
        early = rows[3] | {"loss_spans": [[start, end - 3]]}
        assert evaluate_texts(bound, [*rows[:3], early, *rows[4:]], K) != expected

    def test_spans_of_a_row_add(
        self, bound: BoundDrafter, target: PreTrainedModel
    ) -> None:
        whole = answers(target, bound)[3]
        start, end = whole["loss_spans"][0]
        spans = [[start, start + 6], [start + 9, end]]
        first, second, both = (
            evaluate_texts(bound, [{**whole, "loss_spans": part}], K).total
            for part in (spans[:1], spans[1:], spans)
        )
        assert both.simulated_by_k == (first + second).simulated_by_k
        assert both.teacher_forced == first.teacher_forced + second.teacher_forced
        assert (both.sequences, both.tokens) == (1, first.tokens + second.tokens)

    @pytest.mark.parametrize(
        ("span", "most", "expected"),
        [
            ((3, 7), None, [3, 4, 5]),
            ((3, 7), 2, [3, 4]),
            ((3, 7), 9, [3, 4, 5]),
            ((0, 4), None, [1, 2]),
            ((3, 5), None, [3]),
            ((3, 4), None, []),
            ((3, 3), 2, []),
        ],
    )
    def test_anchors(
        self, span: tuple[int, int], most: int | None, expected: list[int]
    ) -> None:
        assert list(anchors_of(span, most)) == expected

    def test_a_limit_looks_at_the_starts_of_answers(
        self, bound: BoundDrafter, target: PreTrainedModel
    ) -> None:
        rows = answers(target, bound)
        total = evaluate_texts(bound, rows, K, max_anchors_per_span=5).total
        assert total.teacher_forced.drafts == 5 * len(rows)
        # The text goes on behind the window, so nothing there is guessed.
        start = [
            row(prompt, each["input_ids"][: len(prompt) + 6])
            for prompt, each in zip(PROMPTS, rows, strict=True)
        ]
        expected = evaluate_texts(bound, start, K).total
        assert total.teacher_forced == expected.teacher_forced
        assert total.simulated_by_k == expected.simulated_by_k


class TestCategories:
    def test_add_up_to_all(self, bound: BoundDrafter, target: PreTrainedModel) -> None:
        rows = answers(target, bound)
        result = evaluate_texts(bound, iter(rows), K)
        assert list(result.by_category) == ["a", "b"]
        assert [c.sequences for c in result.by_category.values()] == [3, 3]
        assert result.total == result.by_category["a"] + result.by_category["b"]
        alone = [evaluate_texts(bound, [each], K).total for each in rows]
        for name, where in (("a", (0, 1, 4)), ("b", (2, 3, 5))):
            total = CategoryResult.nothing(K)
            for index in where:
                total += alone[index]
            assert result.by_category[name] == total
        found = list(evaluate_rows(bound, iter(rows), K))
        assert found == list(zip("aabbab", alone, strict=True))

    def test_answers_of_one_token_are_sequences_without_drafts(
        self, bound: BoundDrafter, target: PreTrainedModel
    ) -> None:
        rows = [*answers(target, bound)[:1], row([1, 2], [1, 2, 3], "short")]
        result = evaluate_texts(bound, rows, K)
        short = result.by_category["short"]
        assert (short.sequences, short.tokens, short.simulated.drafts) == (1, 1, 0)
        assert result.total.simulated == result.by_category["a"].simulated


class TestRefused:
    @pytest.mark.parametrize("k", [0, K + 1])
    def test_positions_that_the_drafter_has_not(
        self, bound: BoundDrafter, k: int
    ) -> None:
        with pytest.raises(MTPError, match=f"got {k}, expected 1 to {K}"):
            evaluate_texts(bound, [], k)

    def test_no_rows(self, bound: BoundDrafter) -> None:
        with pytest.raises(DataError, match="got 0 rows"):
            evaluate_texts(bound, [], K)

    def test_no_anchor(self, bound: BoundDrafter) -> None:
        with pytest.raises(DataError, match="none of the 2 sequences"):
            evaluate_texts(bound, [row([1, 2], [1, 2, 3])] * 2, K)

    @pytest.mark.parametrize("span", [[2, 9], [-1, 3], [3, 2]])
    def test_spans_that_leave_the_text(
        self, bound: BoundDrafter, span: list[int]
    ) -> None:
        bad = row([1, 2], [1, 2, 3, 4]) | {"loss_spans": [span]}
        with pytest.raises(DataError, match="0000'.*expected a part of its 4"):
            evaluate_texts(bound, [bad], K)


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=5, max_size=5), max_size=30),
    st.lists(st.integers(0, 1), min_size=40, max_size=40),
    st.integers(1, 5),
)
def test_walk_is_a_plain_loop_over_tokens(
    drafts: list[list[int]], text: list[int], k: int
) -> None:
    """``drafts[n]`` stands behind token n of a text whose answer has one more token."""
    lengths = []
    for n, draft in enumerate(drafts):
        right = [draft[i] == text[n + 1 + i] for i in range(5)]
        lengths.append((*right, False).index(False))

    accepted_at: list[set[int]] = [set() for _ in range(k)]
    said, steps = 1, 0  # token 0 comes from the prefill
    while said < len(drafts) + 1:
        anchor = said - 1
        steps += 1
        for i in range(k):
            if drafts[anchor][i] != text[said]:
                break
            accepted_at[i].add(anchor)
            said += 1
        said += 1  # the target's own token
    positions = tuple(map(len, accepted_at))
    assert walk(lengths, k) == AcceptanceCounts(steps, steps * k, positions)


class TestJSON:
    @pytest.fixture
    def result(self, bound: BoundDrafter, target: PreTrainedModel) -> OfflineResult:
        found = evaluate_texts(bound, answers(target, bound), K)
        return OfflineResult(K, found.by_category, {"data": "ü", "limit": None})

    def test_round_trip(self, result: OfflineResult) -> None:
        assert OfflineResult.from_json(result.to_json()) == result
        assert OfflineResult.from_json(result.to_json().encode()) == result

    @pytest.mark.parametrize("text", ["", "[]", '{"k": 4}', '{"k": "x"}'])
    def test_other_files_are_refused(self, text: str) -> None:
        with pytest.raises(DataError, match="not an evaluation"):
            OfflineResult.from_json(text)

    def test_another_format_is_refused(self, result: OfflineResult) -> None:
        text = result.to_json().replace('"format": 1', '"format": 2')
        with pytest.raises(DataError, match="format"):
            OfflineResult.from_json(text)
