# SPDX-License-Identifier: Apache-2.0
"""The drafter on tiny transformers targets."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec.goldens import Blocks, fill_weights, fixed_values, run_blocks
from tests.tiny_targets import FAMILIES, NUM_LAYERS, VOCAB_SIZE, make_tiny
from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.heads import (
    DraftVocab,
    MarkovCorrection,
    pick_block,
    pick_greedy,
)
from vllm_mtp.drafter.layout import block_positions
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import load_frozen
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LORA: dict[str, Any] = {"lora_rank": 2, "lora_modules": [*MODULES]}
TOKENS = torch.arange(24) * 37 % VOCAB_SIZE
# The first has a prefix of one token; neighbours overlap, and one runs off the end.
PREFIX_LENS = torch.tensor([1, 4, 5, 12, 23])

MakeDrafter = Callable[..., Drafter]


@pytest.fixture(params=["tiny_llama", "tiny_qwen3"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def target(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval().requires_grad_(False)


@pytest.fixture
def make(folder: Path) -> MakeDrafter:
    """Makes float32 drafters for the target."""

    def _make(
        layers: str,
        num_draft_tokens: int,
        draft_token_ids: Sequence[int] | None = None,
        **options: Any,
    ) -> Drafter:
        settings = DrafterOptions(dtype="float32", **options)
        return new_drafter(folder, layers, num_draft_tokens, settings, draft_token_ids)

    return _make


def randomized(drafter: Drafter, std: float = 0.2) -> Drafter:
    """The drafter with no weight left at a start value."""
    fill_weights(drafter, std, salt="random ")
    return drafter


@torch.no_grad()
def run(
    target: PreTrainedModel,
    drafter: Drafter,
    num_draft_tokens: int,
    tokens: torch.Tensor = TOKENS,
    prefix_lens: torch.Tensor = PREFIX_LENS,
) -> Blocks:
    return run_blocks(target, drafter, tokens, prefix_lens, num_draft_tokens)


class TestAnchor:
    """All layers of the target give the target's own next token."""

    @pytest.mark.parametrize("layers", ["shared:all", "own:all", "shared:0-1,own:2,3"])
    @pytest.mark.parametrize("num_draft_tokens", [1, 3])
    def test_anchor_rows_are_the_targets_own(
        self,
        target: PreTrainedModel,
        make: MakeDrafter,
        layers: str,
        num_draft_tokens: int,
    ) -> None:
        blocks = run(target, make(layers, num_draft_tokens), num_draft_tokens)
        with torch.no_grad():
            hidden = target.get_decoder()(TOKENS[None]).last_hidden_state[0]
            logits = target(TOKENS[None]).logits[0]
        for ours, its in ((blocks.hidden, hidden), (blocks.scores, logits)):
            torch.testing.assert_close(
                ours[:, 0], its[PREFIX_LENS], atol=1e-4, rtol=1e-4
            )
        assert blocks.tokens[:, 0].equal(logits[PREFIX_LENS].argmax(-1))

    def test_eager_attention_gives_the_same(
        self, folder: Path, target: PreTrainedModel, make: MakeDrafter
    ) -> None:
        eager = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager"
        )
        drafter = randomized(make("shared:all", 3, **ALL_LORA))
        torch.testing.assert_close(
            run(eager, drafter, 3).hidden,
            run(target, drafter, 3).hidden,
            atol=1e-4,
            rtol=1e-4,
        )

    def test_fewer_layers_are_not_the_target(
        self, target: PreTrainedModel, make: MakeDrafter
    ) -> None:
        """So the comparison above can fail."""
        full = run(target, make("shared:all", 1), 1).hidden
        part = run(target, make("shared:0-2", 1), 1).hidden
        assert (full - part).abs().max() > 0.1


# Windows shorter than the text, and than a block with its prefix.
WINDOWS = {"mistral": {"sliding_window": 9}, "gemma3": {"sliding_window": 9}}


# Not all of their layers have a cache.
HYBRIDS = {"qwen3_next", "qwen3_5", "qwen3_5_moe", "nemotron_h"}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - HYBRIDS))
def test_every_family_computes_what_the_target_computes(
    family: str, tmp_path: Path
) -> None:
    """On the anchor's row, and on placeholders given to the target as embeddings."""
    folder = make_tiny(family, tmp_path, **WINDOWS.get(family, {}))
    target = load_frozen(folder, "float32", "cpu")
    drafter = new_drafter(folder, "shared:all", 4, DrafterOptions(dtype="float32"))
    assert drafter.placeholders is not None
    blocks = run(target, randomized(drafter, 1.0), 4)
    embeddings = target.get_input_embeddings()(TOKENS)
    # Granite's scales what it is given for embeddings as well.
    scale = getattr(target.config, "embedding_multiplier", 1.0)
    for row, prefix_len in enumerate(PREFIX_LENS.tolist()):
        known = embeddings[: prefix_len + 1]
        text = torch.cat([known, drafter.placeholders.detach() / scale])[None]
        expected = target(inputs_embeds=text, use_cache=False).logits[0, prefix_len:]
        torch.testing.assert_close(blocks.scores[row], expected, atol=1e-3, rtol=1e-3)


class TestLoRA:
    @pytest.mark.parametrize("module", MODULES)
    @pytest.mark.parametrize("layer", [0, NUM_LAYERS - 1])
    def test_changes_placeholder_rows_only(
        self, target: PreTrainedModel, make: MakeDrafter, module: str, layer: int
    ) -> None:
        plain = make("shared:all", 3)
        lora: dict[str, Any] = {"lora_rank": 2, "lora_modules": [module]}
        changed = randomized(make("shared:all", 3, **lora))
        changed.placeholders.data.copy_(plain.placeholders)
        for index, other in enumerate(changed.layers):
            if index != layer:
                other.lora[module].b.data.zero_()
        before = run(target, plain, 3).hidden
        after = run(target, changed, 3).hidden
        # Bit by bit, so any difference is the LoRA's.
        changed_rows = (after != before).any(-1)
        assert changed_rows.tolist() == [[False, True, True]] * len(PREFIX_LENS)

    def test_new_lora_changes_nothing(
        self, target: PreTrainedModel, make: MakeDrafter
    ) -> None:
        plain = run(target, make("shared:all", 3), 3)
        fresh = run(target, make("shared:all", 3, **ALL_LORA), 3)
        assert fresh.hidden.equal(plain.hidden)


class TestTargetStaysAsItIs:
    def test_a_shadow_shares_all_weights_and_leaves_the_layer_alone(
        self, target: PreTrainedModel, make: MakeDrafter
    ) -> None:
        drafter = randomized(make("shared:all", 3, **ALL_LORA))
        modules = dict(target.named_modules())
        with torch.no_grad():
            before = target(TOKENS[None]).logits
        shadow = drafter.layers[1].bind(HFTarget(target))
        run(target, drafter, 3)
        with torch.no_grad():
            assert target(TOKENS[None]).logits.equal(before)
        now = dict(target.named_modules())
        assert now.keys() == modules.keys()
        assert all(now[path] is module for path, module in modules.items())
        layer = target.get_decoder().layers[1]
        assert shadow is not layer
        originals = {id(weight) for weight in layer.parameters()}
        assert {id(weight) for weight in shadow.parameters()} == originals
        assert shadow.mlp.gate_proj.base is layer.mlp.gate_proj
        assert shadow.input_layernorm is layer.input_layernorm

    def test_layers_without_lora_are_the_targets_own_objects(
        self, target: PreTrainedModel, make: MakeDrafter
    ) -> None:
        bound = BoundDrafter(make("shared:2,own:1,shared:0", 2), HFTarget(target))
        layers = target.get_decoder().layers
        assert bound._shared == {0: layers[2], 2: layers[0]}

    def test_gradients_reach_every_weight_of_the_drafter_and_none_of_the_target(
        self, target: PreTrainedModel, make: MakeDrafter
    ) -> None:
        drafter = make(
            "shared:0,own:1,3",
            3,
            **ALL_LORA,
            markov_rank=2,
            boundary_hidden="all",
            draft_token_ids=tuple(range(0, VOCAB_SIZE, 4)),
        )
        randomized(drafter).requires_grad_(True)
        blocks = run_blocks(target, drafter, TOKENS, PREFIX_LENS, 3)
        blocks.scores.square().mean().backward()
        missing = [
            name
            for name, weight in drafter.named_parameters()
            if weight.grad is None or not weight.grad.abs().sum() > 0
        ]
        assert missing == []
        assert all(weight.grad is None for weight in target.parameters())

    def test_the_prefix_carries_no_gradient(self, target: PreTrainedModel) -> None:
        states = HFTarget(target.requires_grad_(True)).encode(TOKENS)
        assert not states.hidden.requires_grad
        assert not any(keys.requires_grad for keys in states.keys.values())
        assert not any(values.requires_grad for values in states.values.values())


MIXED = "shared:0,1,own:2"


class TestBlocks:
    @pytest.fixture
    def drafter(self, make: MakeDrafter) -> Drafter:
        """Something of everything."""
        return randomized(
            make(MIXED, 4, **ALL_LORA, markov_rank=2, boundary_hidden="all")
        )

    def test_blocks_in_one_forward_equal_each_alone(
        self, target: PreTrainedModel, drafter: Drafter
    ) -> None:
        together = run(target, drafter, 4)
        for index in range(len(PREFIX_LENS)):
            alone = run(target, drafter, 4, prefix_lens=PREFIX_LENS[index, None])
            _assert_same(Blocks(*(part[index, None] for part in together)), alone)

    @pytest.mark.parametrize("fewer", [1, 2, 3])
    def test_fewer_positions_give_the_first_drafts(
        self, target: PreTrainedModel, drafter: Drafter, fewer: int
    ) -> None:
        all_positions = run(target, drafter, 4)
        _assert_same(
            Blocks(*(part[:, :fewer] for part in all_positions)),
            run(target, drafter, fewer),
        )

    def test_tokens_behind_the_anchor_are_not_read(
        self, target: PreTrainedModel, drafter: Drafter
    ) -> None:
        prefix_lens = torch.tensor([8])
        other_end = torch.cat([TOKENS[:9], TOKENS[9:] + 1])
        _assert_same(
            run(target, drafter, 4, TOKENS, prefix_lens),
            run(target, drafter, 4, other_end, prefix_lens),
        )

    @pytest.mark.parametrize("position", range(9))
    def test_every_token_of_the_prefix_and_the_anchor_is_read(
        self, target: PreTrainedModel, drafter: Drafter, position: int
    ) -> None:
        tokens = TOKENS.clone()
        tokens[position] += 1
        prefix_lens = torch.tensor([8])
        before = run(target, drafter, 4, TOKENS, prefix_lens).hidden
        after = run(target, drafter, 4, tokens, prefix_lens).hidden
        assert ((before - after).abs().amax(-1) > 1e-4).all()

    def test_boundary_hidden_is_that_of_the_last_prefix_position(
        self, target: PreTrainedModel, make: MakeDrafter
    ) -> None:
        """Each block must be given its own row, for all its positions."""
        drafter = randomized(make("own:0", 2, boundary_hidden="all"))
        host = HFTarget(target)
        states = host.encode(TOKENS)
        positions = block_positions(PREFIX_LENS, 2)
        boundary = states.hidden[PREFIX_LENS - 1]
        bound = BoundDrafter(drafter, host)
        with host.reading([(states, PREFIX_LENS)], 2), torch.no_grad():
            before = bound.forward(TOKENS[PREFIX_LENS], positions, boundary)
            boundary[2] += 1.0
            after = bound.forward(TOKENS[PREFIX_LENS], positions, boundary)
        changed = (before != after).any(-1)
        assert changed.tolist() == [[block == 2] * 2 for block in range(5)]

    def test_reading_ends_with_its_block(self, target: PreTrainedModel) -> None:
        host = HFTarget(target)
        states = host.encode(TOKENS)
        with host.reading([(states, PREFIX_LENS)], 1):
            pass
        rows = torch.zeros(1, 128), torch.zeros(1, 64), torch.zeros(1, 64)
        with pytest.raises(AssertionError, match="reading"):
            host.attend(0, *rows)


def _assert_same(ours: Blocks, its: Blocks) -> None:
    assert ours.tokens.equal(its.tokens)
    for mine, other in ((ours.hidden, its.hidden), (ours.scores, its.scores)):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


class TestReducedVocabulary:
    TOKEN_IDS = (500, 3, 77, 140, 9, 260)

    def test_logits_are_the_targets_columns(
        self, target: PreTrainedModel, make: MakeDrafter
    ) -> None:
        whole = run(target, make("shared:all", 2), 2)
        small = run(target, make("shared:all", 2, draft_token_ids=self.TOKEN_IDS), 2)
        columns = torch.tensor(self.TOKEN_IDS)
        torch.testing.assert_close(small.scores, whole.scores[..., columns])
        assert small.tokens.equal(columns[small.scores.argmax(-1)])

    def test_distributions_over_the_whole_vocabulary(
        self, target: PreTrainedModel, make: MakeDrafter
    ) -> None:
        """vLLM verifies sampled drafts against distributions of its own width."""
        drafter = randomized(
            make("shared:all", 3, draft_token_ids=self.TOKEN_IDS, markov_rank=2)
        )
        hidden = fixed_values("hidden", torch.Size([3, 3, 64]), 1.0)

        def pick(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return logits.argmax(-1), logits.softmax(-1)

        bound = BoundDrafter(drafter, HFTarget(target))
        small_tokens, small = bound.draft(hidden, pick)
        tokens, whole = bound.draft(hidden, pick, whole_vocab=True)
        assert small is not None
        assert whole is not None
        assert small.shape == (3, 3, len(self.TOKEN_IDS))
        assert whole.shape == (3, 3, VOCAB_SIZE)
        assert tokens.equal(small_tokens)
        assert tokens.equal(whole.argmax(-1))
        torch.testing.assert_close(whole[..., list(self.TOKEN_IDS)], small)
        others = [t for t in range(VOCAB_SIZE) if t not in self.TOKEN_IDS]
        assert (whole[..., others] == 0).all()


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 9),
)
def test_pick_block_is_a_plain_loop(
    num_blocks: int, num_draft_tokens: int, reduced: bool, corrected: bool, salt: int
) -> None:
    hidden_size, vocab_size, rank = 6, 12, 3
    token_ids = [11, 2, 7, 5, 0] if reduced else list(range(vocab_size))

    def values(name: str, *shape: int) -> torch.Tensor:
        return fixed_values(f"{name} {salt}", torch.Size(shape), 1.0)

    logits = values("logits", num_blocks, num_draft_tokens, len(token_ids))
    hidden = values("hidden", num_blocks, num_draft_tokens, hidden_size)
    markov = MarkovCorrection(rank, hidden_size, vocab_size, len(token_ids))
    fill_weights(markov, std=1.0, salt=str(salt))
    vocab = DraftVocab(len(token_ids))
    vocab.token_ids.copy_(torch.tensor(token_ids))

    expected: list[list[int]] = []
    for block in range(num_blocks):
        expected.append([])
        for position in range(num_draft_tokens):
            scores = logits[block, position].clone()
            if corrected and position > 0:
                gate = markov.gate.weight @ hidden[block, position] + markov.gate.bias
                previous = markov.embed.weight[expected[-1][-1]]
                scores += markov.unembed.weight @ (gate.sigmoid() * previous)
            best = max(range(len(token_ids)), key=lambda i: scores[i].item())
            expected[-1].append(token_ids[best])

    for spread_to in (None, vocab_size):
        tokens, kept = pick_block(
            logits,
            hidden,
            markov if corrected else None,
            vocab if reduced else None,
            pick_greedy,
            spread_to=spread_to,
        )
        assert tokens.tolist() == expected
        assert kept is None


def test_drafter_state_is_the_drafters_own(make: MakeDrafter) -> None:
    """Nothing of the target is in the checkpoint, whatever the drafter shares."""
    drafter = make("shared:all", 3, **ALL_LORA)
    assert {name.partition(".")[0] for name in drafter.state_dict()} == {
        "placeholders",
        "layers",
    }
    assert all(
        ".lora." in name for name in drafter.state_dict() if name != "placeholders"
    )


def test_targets_that_lost_their_rope_are_refused(target: PreTrainedModel) -> None:
    del target.get_decoder().rotary_emb
    with pytest.raises(UnsupportedTargetError, match="cannot be run .*rotary_emb"):
        HFTarget(target)
