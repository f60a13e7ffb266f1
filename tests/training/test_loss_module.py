# SPDX-License-Identifier: Apache-2.0
"""From a text to a lesson: anchors, candidates, states and the teacher."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec.goldens import fill_weights
from tests.tiny_targets import VOCAB_SIZE
from vllm_mtp.drafter.layout import IGNORE_LABEL, possible_anchors
from vllm_mtp.drafter.vocabulary import frequent_tokens
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.torch_host.target_states import TargetStates
from vllm_mtp.torch_host.texts import forward_texts
from vllm_mtp.training.anchors import choose_anchors, generator_for
from vllm_mtp.training.loss_module import LossModule, LossPlan
from vllm_mtp.training.loss_vocabulary import LossVocabulary, own_token_counts
from vllm_mtp.training.objective import Objective
from vllm_mtp.training.states import StatesSource, TrainingInputError, require_sane
from vllm_mtp.training.states_folder import StatesFolder
from vllm_mtp.training.token_loss import TokenLoss

TOKENS = torch.arange(30) * 37 % VOCAB_SIZE
TEXT: dict[str, Any] = {"index": 0, "input_ids": TOKENS, "loss_spans": [[4, 30]]}
OPTIONS = DrafterOptions(
    dtype="float32",
    lora_rank=2,
    lora_modules=["q_proj", "up_proj"],
    markov_rank=4,
)


@pytest.fixture(scope="module")
def host(tiny_llama: Path) -> HFTarget:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    return HFTarget(model.eval().requires_grad_(False))


class TestAnchors:
    def test_anchor_and_label_are_the_targets_own(self) -> None:
        assert possible_anchors([[3, 6], [8, 9], [10, 99]], 13).tolist() == [
            3, 4, 10, 11,
        ]  # fmt: skip

    def test_a_block_has_a_prefix(self) -> None:
        assert possible_anchors([[0, 3]], 3).tolist() == [1]

    @given(st.integers(0, 50), st.integers(1, 60), st.integers(0, 1000))
    def test_choice(self, size: int, count: int, seed: int) -> None:
        possible = torch.arange(size) * 3
        chosen = choose_anchors(possible, count, generator_for(seed)).tolist()
        assert len(chosen) == min(size, count)
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= set(possible.tolist())
        assert chosen == choose_anchors(possible, count, generator_for(seed)).tolist()

    def test_each_step_and_text_has_its_own(self) -> None:
        possible = torch.arange(1000)
        chosen = {
            tuple(choose_anchors(possible, 5, generator_for(0, step, text)).tolist())
            for step in range(10)
            for text in range(10)
        }
        assert len(chosen) == 100

    def test_labels_end_with_the_targets_own_span(
        self, host: HFTarget, tiny_llama: Path
    ) -> None:
        """What another speaker says is nothing to draft."""
        drafter = new_drafter(tiny_llama, "own:0", 3, DrafterOptions(dtype="float32"))
        loss_module = LossModule(drafter, host, LossPlan())
        text = TEXT | {"loss_spans": [[4, 7], [9, 12]]}
        blocks = loss_module.blocks(text, step=0)
        assert blocks.prefix_lens.tolist() == [4, 5, 9, 10]
        positions = [[5, 6, None], [6, None, None], [10, 11, None], [11, None, None]]
        assert blocks.labels(3).tolist() == [
            [IGNORE_LABEL if n is None else TOKENS[n].item() for n in row]
            for row in positions
        ]


class TestCandidates:
    def test_columns(self) -> None:
        candidates = LossVocabulary(torch.tensor([5, 2, 9]), 10)
        labels = torch.tensor([[2, 7], [IGNORE_LABEL, 9]])
        assert candidates.columns(labels).tolist() == [
            [1, IGNORE_LABEL],
            [IGNORE_LABEL, 2],
        ]
        more = candidates.with_labels(labels)
        assert more.token_ids.tolist() == [5, 2, 9, 7]
        assert more.columns(labels).tolist() == [[1, 3], [IGNORE_LABEL, 2]]
        assert candidates.with_labels(torch.tensor([5, 9])) is candidates

    def test_frequent_tokens_are_counted_in_the_targets_own_part(self) -> None:
        rows = [{"input_ids": [9, 9, 9, 4, 4, 7], "loss_spans": [[3, 6]]}]
        counts = own_token_counts(rows)
        assert counts == Counter({4: 2, 7: 1})
        assert frequent_tokens(counts, [8], 3, range(10)) == (4, 7, 8)
        assert frequent_tokens(counts, [], 5, range(10)) == (0, 1, 2, 4, 7)


class TestLearner:
    def loss_module(
        self, host: HFTarget, target: Path, layers: str, **plan: Any
    ) -> LossModule:
        drafter = new_drafter(target, layers, 3, OPTIONS)
        fill_weights(drafter, 0.1, salt="lesson ")
        return LossModule(drafter, host, LossPlan(anchors_per_text=6, **plan))

    @pytest.mark.parametrize("layers", ["shared:all", "shared:0,own:2"])
    def test_scoring_fewer_tokens_is_scoring_them_alone(
        self, host: HFTarget, tiny_llama: Path, layers: str
    ) -> None:
        """LossVocabulary cut the softmax, and change nothing about the scores."""
        loss_module = self.loss_module(host, tiny_llama, layers)
        whole = loss_module([TEXT], step=3)["loss"]

        def loss(token_ids: torch.Tensor) -> torch.Tensor:
            candidates = LossVocabulary(token_ids, VOCAB_SIZE)
            loss_module.token_loss = TokenLoss(loss_module.bound, candidates)
            return loss_module([TEXT], step=3)["loss"]

        torch.testing.assert_close(loss(torch.arange(VOCAB_SIZE).flip(0)), whole)
        assert loss(torch.arange(8)) < whole

    @pytest.mark.parametrize(
        ("layers", "options"),
        [
            ("own:2", {"lm_head": "own"}),
            (
                "mlp:1",
                {
                    **{"lm_head": "own", "input": "boundary", "mlp_form": "square"},
                    "markov_rank": None,
                },
            ),
            ("shared:0,own:2", {"chain": True, "markov_rank": None}),
            ("shared:all", {"lm_head": "own", "lora_rank": 2}),
        ],
    )
    def test_candidates_that_are_all_tokens_change_no_loss(
        self, host: HFTarget, tiny_llama: Path, layers: str, options: dict[str, Any]
    ) -> None:
        """Also with LM heads of the drafter's own, of which rows are taken then."""
        objective = Objective(ce=0.5, kl=1, tv=1, teacher_tokens=0)
        drafter = new_drafter(tiny_llama, layers, 3, replace(OPTIONS, **options))
        fill_weights(drafter, 0.1, salt="lesson ")
        plan = LossPlan(objective, anchors_per_text=6)
        loss_module = LossModule(drafter, host, plan)

        def gradients(candidates: LossVocabulary | None) -> dict[str, torch.Tensor]:
            loss_module.token_loss = TokenLoss(loss_module.bound, candidates)
            loss_module.zero_grad()
            parts = loss_module([TEXT], step=3)
            parts["loss"].backward()
            found = {n: p.grad for n, p in drafter.named_parameters()}
            return {"loss": parts["loss"].detach(), **found}  # type: ignore[dict-item]

        whole = {name: x for name, x in gradients(None).items() if x is not None}
        some = gradients(LossVocabulary(torch.arange(VOCAB_SIZE).flip(0), VOCAB_SIZE))
        assert len(whole) > 2
        for name, gradient in whole.items():
            torch.testing.assert_close(some[name], gradient, atol=1e-5, rtol=1e-4)
        few = gradients(LossVocabulary(torch.arange(8), VOCAB_SIZE))
        assert few["loss"] < whole["loss"]

    def test_own_lm_heads_learn_from_their_own_positions(
        self, host: HFTarget, tiny_llama: Path
    ) -> None:
        """Also where the first position is not taught, since it is exact."""
        options = replace(OPTIONS, lm_head="own", markov_rank=None)
        drafter = new_drafter(tiny_llama, "shared:all", 3, options)
        fill_weights(drafter, 0.1, salt="lesson ")
        loss_module = LossModule(drafter, host, LossPlan(anchors_per_text=6))
        blocks = loss_module.blocks(TEXT, 0)
        with torch.no_grad():
            hidden = forward_texts(loss_module.bound, [blocks], 3)
            logits = loss_module.bound.logits(hidden)[:, 1:]
            labels = blocks.labels(3)[:, 1:]
            each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        parts = loss_module.loss_of([blocks])
        expected = each[labels != IGNORE_LABEL].mean()
        torch.testing.assert_close(parts["ce"], expected)
        parts["loss"].backward()
        assert drafter.lm_heads is not None
        gradient = drafter.lm_heads.weight.grad
        assert gradient is not None
        assert gradient.flatten(1).any(1).tolist() == [False, True, True]

    def test_texts_in_a_batch_do_not_touch(
        self, host: HFTarget, tiny_llama: Path
    ) -> None:
        loss_module = self.loss_module(host, tiny_llama, "shared:0,own:2")
        other = TEXT | {"index": 1, "input_ids": TOKENS.flip(0)[:20]}
        other["loss_spans"] = [[4, 20]]
        one, two = (
            loss_module.loss_of([loss_module.blocks(t, 0)]) for t in (TEXT, other)
        )
        both = loss_module.loss_of([loss_module.blocks(t, 0) for t in (TEXT, other)])
        # Two blocks of 6 run to the end of a text; the positions' means differ by that.
        expected = (one["ce"] + two["ce"]) / 2
        torch.testing.assert_close(both["ce"], expected, atol=0.5, rtol=0)

    def test_positions_that_are_not_taught_do_not_count(
        self, host: HFTarget, tiny_llama: Path
    ) -> None:
        """The first positions of a causal block do not depend on the later ones."""
        loss_module = self.loss_module(host, tiny_llama, "shared:0,own:2")
        one = self.loss_module(host, tiny_llama, "shared:0,own:2", num_draft_tokens=1)
        hidden = forward_texts(loss_module.bound, [loss_module.blocks(TEXT, 0)], 3)
        first = forward_texts(one.bound, [one.blocks(TEXT, 0)], one.num_draft_tokens)
        torch.testing.assert_close(first, hidden[:, :1])
        one([TEXT], step=0)["loss"].backward()
        assert one.drafter.placeholders is not None
        assert one.drafter.placeholders.grad is None
        own = one.drafter.layers[1].q_proj.weight.grad
        assert own.abs().max() > 0

    def test_the_first_position_of_a_shared_target_is_not_taught(
        self, host: HFTarget, tiny_llama: Path
    ) -> None:
        """It is exact whatever the drafter's weights are, so it has no gradient."""
        loss_module = self.loss_module(host, tiny_llama, "shared:all")
        assert loss_module.first_position_is_exact
        loss_module([TEXT], step=0)["loss"].backward()
        assert all(
            p.grad is not None and p.grad.abs().sum() > 0
            for p in loss_module.parameters()
        )

    @pytest.mark.parametrize("teacher_tokens", [5, 0])
    def test_teacher_is_the_targets_own_distribution(
        self, host: HFTarget, tiny_llama: Path, teacher_tokens: int
    ) -> None:
        objective = Objective(ce=0, kl=1, tv=1, teacher_tokens=teacher_tokens)
        loss_module = self.loss_module(host, tiny_llama, "own:0,3", objective=objective)
        blocks = loss_module.blocks(TEXT, 0)
        with torch.no_grad():
            p = host.model(TOKENS[None]).logits[0]
            hidden = forward_texts(loss_module.bound, [blocks], 3)
            log_q = loss_module.bound.logits(hidden)
            labels = blocks.labels(3)
            log_q += loss_module.token_loss._markov(hidden, labels, 0, None)
            log_q = log_q.log_softmax(-1)
        if teacher_tokens:
            p[p < p.topk(teacher_tokens).values[:, -1:]] = float("-inf")
        p = p.softmax(-1)
        kl, tv = [], []
        for block, n in enumerate(blocks.prefix_lens.tolist()):
            for place in range(3):
                if labels[block, place] != IGNORE_LABEL:
                    wanted, got = p[n + place], log_q[block, place]
                    kl.append(F.kl_div(got, wanted, reduction="sum"))
                    tv.append((got.exp() - wanted).abs().sum() / 2)
        parts = loss_module.loss_of([blocks])
        torch.testing.assert_close(parts["kl"], torch.stack(kl).mean())
        torch.testing.assert_close(parts["tv"], torch.stack(tv).mean())

    def test_what_a_reduced_vocabulary_cannot_say_is_lost(
        self, host: HFTarget, tiny_llama: Path
    ) -> None:
        """One minus the exact TV is the rate at which drafts are accepted."""
        options = DrafterOptions(dtype="float32", draft_vocab_size=40)
        tokens = tuple(range(0, VOCAB_SIZE, VOCAB_SIZE // 40))[:40]
        drafter = new_drafter(tiny_llama, "own:0,3", 1, options, tokens)
        fill_weights(drafter, 0.1, salt="lesson ")
        objective = Objective(ce=0, tv=1, teacher_tokens=0)
        loss_module = LossModule(drafter, host, LossPlan(objective))
        text = TEXT | {"input_ids": torch.tensor(tokens[:30])}
        blocks = loss_module.blocks(text, 0)
        hidden = forward_texts(loss_module.bound, [blocks], 1)
        p = host.logits(blocks.states.hidden[blocks.prefix_lens]).softmax(-1)
        q = loss_module.bound.logits(hidden)[:, 0].softmax(-1)
        accepted = torch.minimum(p[:, torch.tensor(tokens)], q).sum(-1).mean()
        torch.testing.assert_close(loss_module.loss_of([blocks])["tv"], 1 - accepted)

    def test_a_drafter_that_is_the_target_has_no_kl(
        self, host: HFTarget, tiny_llama: Path
    ) -> None:
        objective = Objective(ce=0, kl=1, tv=1, teacher_tokens=VOCAB_SIZE)
        drafter = new_drafter(tiny_llama, "own:all", 1, DrafterOptions(dtype="float32"))
        plan = LossPlan(objective=objective, feature_weight=1.0)
        parts = LossModule(drafter, host, plan)([TEXT], step=0)
        for name in ("kl", "tv", "feature"):
            assert parts[name].abs() < 1e-4, name

    def test_one_row_is_enough_for_features(
        self, host: HFTarget, tiny_llama: Path
    ) -> None:
        drafter = new_drafter(tiny_llama, "own:0,3", 3, OPTIONS)
        loss_module = LossModule(drafter, host, LossPlan(feature_weight=1.0))
        parts = loss_module([TEXT | {"loss_spans": [[28, 30]]}], step=0)
        assert parts["loss"].isfinite()

    def test_features_teach_own_layers(self, host: HFTarget, tiny_llama: Path) -> None:
        # Next to no weight on the tokens, so that only the features teach.
        plan = LossPlan(Objective(ce=1e-6), anchors_per_text=6, feature_weight=1.0)
        drafter = new_drafter(tiny_llama, "own:0,3", 3, OPTIONS)
        loss_module = LossModule(drafter, host, plan)
        optimizer = torch.optim.AdamW(loss_module.parameters(), lr=3e-3)
        errors = []
        for _ in range(15):
            parts = loss_module([TEXT], step=0)
            errors.append(parts["feature"].item())
            parts["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert errors[-1] < 0.7 * errors[0]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the texts that a target has encoded."""
    lengths: list[int] = []
    encode = HFTarget.encode

    def counted(self: HFTarget, ids: torch.Tensor, **kept: Any) -> TargetStates:
        lengths.append(len(ids))
        return encode(self, ids, **kept)

    monkeypatch.setattr(HFTarget, "encode", counted)
    return lengths


class TestStates:
    def test_states_are_kept_while_they_fit(
        self, host: HFTarget, encoded: list[int]
    ) -> None:
        size = 30 * (64 + 2 * 2 * 2 * 32) * 4  # hidden, and K and V of two layers
        source = StatesSource(host, {0, 2}, budget_bytes=size + 10)
        for key in (0, 1, 0, 1):
            assert sorted(source.get(key, TOKENS).keys) == [0, 2]
        assert len(encoded) == 3

    def test_states_on_disk_are_those_of_the_target(
        self, host: HFTarget, encoded: list[int], tmp_path: Path
    ) -> None:
        def of(layers: set[int], streams: set[int] = frozenset()) -> TargetStates:  # type: ignore[assignment]
            return StatesSource(host, layers, streams, folder=tmp_path).get(0, TOKENS)

        expected = host.encode(TOKENS, streams={1})
        encoded.clear()
        of({0, 2})
        found = of({2})  # another run, which asks for less
        assert len(encoded) == 1
        assert torch.equal(found.keys[2], expected.keys[2])
        assert torch.equal(found.values[2], expected.values[2])
        assert torch.equal(found.hidden, expected.hidden)
        found = of({1}, {1})  # for more: that is added, and the rest stays
        assert torch.equal(found.streams[1], expected.streams[1])
        of({0, 1, 2}, {1})
        assert len(encoded) == 2
        # A text that was cut off while it was written is written anew.
        (file,) = tmp_path.rglob("*.safetensors")
        file.write_bytes(file.read_bytes()[:100])
        assert torch.equal(of({2}).keys[2], expected.keys[2])

    def test_another_target_has_other_states_on_disk(
        self, host: HFTarget, tmp_path: Path
    ) -> None:
        StatesSource(host, {0}, folder=tmp_path).get(0, TOKENS)
        weight = host.layer(1).mlp.up_proj.weight.data
        before = weight.clone()
        try:
            weight += 0.1
            found = StatesSource(host, {2}, folder=tmp_path).get(0, TOKENS)
            assert torch.equal(found.keys[2], host.encode(TOKENS).keys[2])
        finally:
            weight.copy_(before)
        assert len(list(tmp_path.iterdir())) == 2

    def test_another_packed_target_has_other_states_on_disk(
        self, host: HFTarget, tmp_path: Path
    ) -> None:
        """Its weights are buffers. What is not saved is no part of a target's name."""
        linear, names = host.layer(1).mlp.up_proj, []
        for number, persistent in ((0, False), (1, False), (0, True), (1, True)):
            packed = torch.full((4, 4), number, dtype=torch.int32)
            linear.register_buffer("packed", packed, persistent=persistent)
            try:
                folder = tmp_path / f"{number} {persistent}"
                StatesFolder(folder, host)
                names.append(next(folder.iterdir()).name)
            finally:
                del linear.packed
        StatesFolder(tmp_path / "none", host)
        plain = next((tmp_path / "none").iterdir()).name
        assert names[:2] == [plain, plain]
        assert len({*names}) == 3

    def test_the_same_weights_with_another_config_are_another_target(
        self, tiny_llama: Path, tmp_path: Path
    ) -> None:
        for eps in (1e-6, 1e-2):
            model = AutoModelForCausalLM.from_pretrained(tiny_llama, rms_norm_eps=eps)
            other = HFTarget(model.eval().requires_grad_(False))
            found = StatesSource(other, {0}, folder=tmp_path).get(0, TOKENS)
            assert torch.equal(found.hidden, other.encode(TOKENS).hidden)

    def test_two_runs_may_write_the_same_text_at_once(
        self, host: HFTarget, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Neither knows what the other asks for; one of both is written last."""
        encode, write = HFTarget.encode, StatesFolder._write
        others = [False]

        def written_in_between(self: StatesFolder, path: Path, states: Any) -> None:
            write(self, path, states)
            if not others[0]:
                others[0] = True
                path.unlink()
                StatesSource(host, {1}, folder=tmp_path).get(0, TOKENS)

        monkeypatch.setattr(StatesFolder, "_write", written_in_between)
        found = StatesSource(host, {2}, folder=tmp_path).get(0, TOKENS)
        assert torch.equal(found.keys[2], encode(host, TOKENS).keys[2])

    @pytest.mark.parametrize(
        ("fill", "reason"),
        [
            (0.0, "all zero"),
            (2.5, "constant"),
            (float("nan"), "not finite"),
            (float("inf"), "not finite"),
            ("row", "the same for every token"),
        ],
    )
    def test_what_cannot_be_learnt_from_is_refused(
        self, host: HFTarget, fill: Any, reason: str
    ) -> None:
        states = host.encode(TOKENS)
        require_sane(states, 7, TOKENS)
        keys = states.keys[2]
        if fill == "row":
            keys.copy_(keys[:, :1].clone().expand_as(keys))
        else:
            keys.fill_(fill)
        with pytest.raises(TrainingInputError, match=f"text 7.*layer 2.*{reason}"):
            require_sane(states, 7, TOKENS)

    def test_one_repeated_token_is_no_fault(self, host: HFTarget) -> None:
        """Real answers loop. Without a position in them, values are the same then."""
        repeated = torch.full((9,), 7)
        states = host.encode(repeated)
        assert (states.values[0] == states.values[0][..., :1, :]).all()
        require_sane(states, 7, repeated)
        with pytest.raises(TrainingInputError, match="the same for every token"):
            require_sane(states, 7, torch.arange(9))
        states.values[0].zero_()
        with pytest.raises(TrainingInputError, match="all zero"):
            require_sane(states, 7, repeated)
