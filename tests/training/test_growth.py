# SPDX-License-Identifier: Apache-2.0
"""Drafters that start from drafters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec.goldens import fill_weights, run_blocks
from tests.tiny_targets import VOCAB_SIZE
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.training.growth import (
    freeze_all_but_new_positions,
    require_same_but_positions,
    warm_start,
)
from vllm_mtp.training.optimizer import optimizer_of
from vllm_mtp.training.states import TrainingInputError

OPTIONS = DrafterOptions(dtype="float32", markov_rank=2)
TOKENS = torch.arange(20) * 37 % VOCAB_SIZE
LENS = torch.tensor([3, 9])


@pytest.fixture
def trained(tiny_llama: Path) -> Drafter:
    drafter = new_drafter(tiny_llama, "shared:0,own:1,own:2,own:2", 3, OPTIONS)
    fill_weights(drafter, 0.2, salt="trained ")
    return drafter


def test_layers_can_be_left_out(tiny_llama: Path, trained: Drafter) -> None:
    healed = new_drafter(tiny_llama, "shared:0,own:2", 3, OPTIONS)
    assert warm_start(healed, trained) == []
    ours, theirs = healed.state_dict(), trained.state_dict()
    for name, tensor in ours.items():
        assert tensor.equal(theirs[name.replace("layers.1.", "layers.2.")]), name


def test_what_does_not_fit_is_named(tiny_llama: Path, trained: Drafter) -> None:
    options = replace(OPTIONS, markov_rank=4)
    other = new_drafter(tiny_llama, "own:2,own:3", 3, options)
    start = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    left = warm_start(other, trained)
    assert {name.split(".")[0] for name in left} == {"layers", "markov"}
    assert all(name.startswith(("layers.1.", "markov.")) for name in left)
    for name in left:
        assert other.state_dict()[name].equal(start[name])


def test_the_markov_correction_follows_its_tokens(tiny_llama: Path) -> None:
    few = new_drafter(tiny_llama, "own:1", 2, OPTIONS, (3, 5, 9))
    fill_weights(few, 0.2, salt="few ")
    more = new_drafter(tiny_llama, "own:1", 2, OPTIONS, (3, 4, 9, 11))
    assert warm_start(more, few) == []
    assert more.draft_vocab is not None
    assert more.markov is not None
    assert few.markov is not None
    assert more.draft_vocab.token_ids.tolist() == [3, 4, 9, 11]
    ours, theirs = more.markov.unembed.weight, few.markov.unembed.weight
    assert ours[[0, 2]].equal(theirs[[0, 2]])
    assert not ours[[1, 3]].any()
    whole = new_drafter(tiny_llama, "own:1", 2, OPTIONS)
    assert warm_start(whole, few) == []
    assert whole.markov is not None
    assert whole.markov.unembed.weight[[3, 5, 9]].equal(theirs)


def test_nothing_that_fits_is_refused(tiny_llama: Path, trained: Drafter) -> None:
    other = new_drafter(tiny_llama, "own:3", 1, DrafterOptions(dtype="float32"))
    with pytest.raises(TrainingInputError, match="no weight of that drafter fits"):
        warm_start(other, trained)


def test_a_looped_extension_keeps_the_first_positions(
    tiny_llama: Path, trained: Drafter
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        before = run_blocks(model, trained, TOKENS, LENS, 3)
    longer = new_drafter(tiny_llama, "shared:0,own:1,own:2,own:2", 6, OPTIONS)
    assert warm_start(longer, trained) == []
    assert longer.placeholders is not None
    assert trained.placeholders is not None
    assert longer.placeholders[2:4].equal(trained.placeholders)
    freeze_all_but_new_positions(longer, num_old=3)
    optimizer = torch.optim.AdamW(
        [p for p in longer.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0
    )
    for _ in range(3):
        run_blocks(model, longer, TOKENS, LENS, 6).hidden.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = run_blocks(model, longer, TOKENS, LENS, 6)
    torch.testing.assert_close(after.hidden[:, :3], before.hidden)
    assert after.tokens[:, :3].equal(before.tokens)
    assert not longer.placeholders[2:4].equal(trained.placeholders)


class _Rates:
    """As a run that trains new positions alone sets them, with a large decay."""

    learning_rate, weight_decay = 0.1, 0.5
    placeholder_lr_scale = markov_lr_scale = 1.0
    own_optimizer, train_only = "as_optim", "new_positions"


HEADS = replace(
    OPTIONS, markov_rank=None, input="boundary", lm_head="own", per_position=True
)


def _made(folder: Path, k: int, options: DrafterOptions = HEADS) -> Drafter:
    drafter = new_drafter(folder, "own:1,mlp:1", k, options)
    fill_weights(drafter, 0.2, salt=f"{k} ")
    return drafter


@pytest.mark.parametrize(
    ("num_old", "num_new", "origins"),
    [
        # Added positions go round, but the first is that of the next token.
        (3, 7, [0, 1, 2, 1, 2, 1, 2]),
        (4, 2, [0, 1]),
        (1, 3, [0, 0, 0]),
        (2, 4, [0, 1, 1, 1]),
    ],
)
def test_weights_per_position_go_round_as_placeholders_do(
    tiny_llama: Path, num_old: int, num_new: int, origins: list[int]
) -> None:
    old, new = _made(tiny_llama, num_old), _made(tiny_llama, num_new)
    assert warm_start(new, old) == []
    theirs = old.state_dict()
    assert new.weights_by_position().keys() >= {
        *("lm_heads.weight", "layers.0.q_proj.weight", "layers.1.up_proj.weight")
    }
    for name, tensor in new.state_dict().items():
        wanted = theirs[name]
        if name in new.weights_by_position():
            wanted = wanted[origins]
        assert tensor.equal(wanted), name
    rows = replace(HEADS, input="block", lm_head="target")
    old, new = (_made(tiny_llama, k, rows) for k in (num_old, num_new))
    assert warm_start(new, old) == (["placeholders"] if num_old == 1 else [])
    if num_old > 1:
        assert old.placeholders is not None
        assert new.placeholders is not None
        begun = [origin - 1 for origin in origins[1:]]
        assert new.placeholders.equal(old.placeholders[begun])


def test_positions_begin_with_the_weights_that_all_of_them_had(
    tiny_llama: Path,
) -> None:
    options = replace(OPTIONS, markov_rank=None)
    old = _made(tiny_llama, 2, options)
    new = _made(tiny_llama, 3, replace(options, per_position=True))
    assert warm_start(new, old) == []
    weight = new.layers[0].q_proj.weight
    assert weight.equal(old.layers[0].q_proj.weight.expand_as(weight))
    # The other way, no one of several weights is that of all positions.
    left = warm_start(_made(tiny_llama, 2, options), new)
    assert "layers.0.q_proj.weight" in left
    assert "layers.0.input_norm.weight" not in left


def test_own_lm_heads_follow_their_tokens(tiny_llama: Path) -> None:
    def made(*ids: int) -> Drafter:
        options = replace(HEADS, draft_vocab_size=len(ids))
        return new_drafter(tiny_llama, "mlp:1", 2, options, ids)

    few, more = made(3, 5, 9), made(3, 4, 9, 11)
    fill_weights(few, 0.2, salt="few ")
    start = more.state_dict()["lm_heads.weight"].clone()
    assert warm_start(more, few) == []
    ours, theirs = more.state_dict(), few.state_dict()
    rows = ours["lm_heads.weight"]
    assert rows[:, [0, 2]].equal(theirs["lm_heads.weight"][:, [0, 2]])
    assert rows[:, [1, 3]].equal(start[:, [1, 3]])
    assert ours["draft_vocab.token_ids"].tolist() == [3, 4, 9, 11]


def test_an_extension_of_heads_keeps_the_first_positions(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    old, new = _made(tiny_llama, 2), _made(tiny_llama, 4)
    warm_start(new, old)
    freeze_all_but_new_positions(new, num_old=2)
    optimizer = optimizer_of(new, _Rates(), torch.optim.AdamW)  # type: ignore[arg-type]
    before = {name: w.detach().clone() for name, w in new.named_parameters()}
    for _ in range(2):
        blocks = run_blocks(model, new, TOKENS, LENS, 4)
        blocks.scores.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in new.named_parameters():
        changed = weight != before[name]
        if name in new.weights_by_position():
            assert changed.flatten(1).any(1).tolist() == [False] * 2 + [True] * 2, name
        else:
            assert not changed.any(), name


@pytest.mark.parametrize(
    ("layers", "options", "reason"),
    [
        ("own:1", {"chain": True}, "neither placeholders nor weights per position"),
        ("own:1", {"block_mask": "bidirectional"}, "block_mask 'bidirectional'"),
    ],
)
def test_extensions_that_cannot_keep_the_first_positions_are_refused(
    tiny_llama: Path, layers: str, options: dict[str, Any], reason: str
) -> None:
    settings = replace(OPTIONS, markov_rank=None, **options)
    drafter = new_drafter(tiny_llama, layers, 4, settings)
    with pytest.raises(TrainingInputError, match=reason):
        freeze_all_but_new_positions(drafter, num_old=2)


def test_an_extension_that_adds_nothing_is_refused(trained: Drafter) -> None:
    with pytest.raises(TrainingInputError, match="adds no position"):
        freeze_all_but_new_positions(trained, num_old=3)


def test_another_lora_scale_is_refused(tiny_llama: Path) -> None:
    def made(alpha: float) -> Drafter:
        options = replace(
            OPTIONS, lora_rank=2, lora_alpha=alpha, lora_modules=["q_proj"]
        )
        return new_drafter(tiny_llama, "shared:0", 2, options)

    warm_start(made(4.0), made(4.0))
    with pytest.raises(TrainingInputError, match="lora_alpha: got 8.0 at rank 2"):
        warm_start(made(8.0), made(4.0))


def test_new_positions_keep_the_rest(tiny_llama: Path, trained: Drafter) -> None:
    same = new_drafter(tiny_llama, "shared:0,own:1,own:2,own:2", 6, OPTIONS)
    require_same_but_positions(same, trained)
    other = new_drafter(
        tiny_llama, "shared:0,own:2", 6, replace(OPTIONS, markov_rank=None)
    )
    with pytest.raises(TrainingInputError, match="layers, markov differ"):
        require_same_but_positions(other, trained)


def test_noise_stays_the_targets_where_positions_are_added(tiny_llama: Path) -> None:
    options = replace(HEADS, placeholder_kind="noise", input="block", lm_head="target")
    new = _made(tiny_llama, 4, options)
    freeze_all_but_new_positions(new, num_old=2)
    assert new.placeholders is not None
    assert not new.placeholders.requires_grad
    assert any(weight.requires_grad for weight in new.parameters())


def test_an_mlp_layer_takes_no_weights_of_another_form(tiny_llama: Path) -> None:
    old, new = (
        new_drafter(tiny_llama, "mlp:1", 2, replace(HEADS, mlp_form=form))
        for form in ("gated", "plain")
    )
    fill_weights(old, 0.2, salt="old ")
    left = warm_start(new, old)
    assert {name for name in new.state_dict() if name.startswith("layers.")} == {*left}


@pytest.mark.parametrize(
    ("before", "after", "new"),
    [
        (
            {},
            {"own_attention": "block"},
            {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"},
        ),
        ({}, {"boundary_of": "bound"}, {"boundary_proj.weight"}),
        (
            {"boundary_layers": [0, 1]},
            {"boundary_layers": [1, 2]},
            {"boundary_proj.weight", "boundary_mix"},
        ),
        ({}, {"per_position": True, "bridges": True}, {"bridge.weight", "bridge.bias"}),
    ],
)
def test_weights_for_another_computation_are_not_taken(
    tiny_llama: Path, before: dict[str, Any], after: dict[str, Any], new: set[str]
) -> None:
    """Their shapes are the same, so nothing else would tell."""
    options = replace(OPTIONS, boundary_hidden="all")
    old, ours = (
        new_drafter(tiny_llama, "own:1", 2, replace(options, **changes))
        for changes in (before, after)
    )
    fill_weights(old, 0.2, salt="old ")
    start = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    left = warm_start(ours, old)
    assert {name.removeprefix("layers.0.") for name in left} == new
    for name, tensor in ours.state_dict().items():
        assert tensor.equal(start[name]) == (name in left), name


def test_a_layer_of_another_form_is_not_taken(tiny_qwen3: Path) -> None:
    """A copy of the target's layer norms queries and keys, as Llama's does not."""
    old, ours = (
        new_drafter(tiny_qwen3, "own:1", 2, replace(OPTIONS, own_init=init))
        for init in ("random", "copy")
    )
    assert {n for n in ours.state_dict() if n.startswith("layers.")} == {
        n for n in warm_start(ours, old) if n.startswith("layers.")
    }
