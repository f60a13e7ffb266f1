# SPDX-License-Identifier: Apache-2.0
"""The axes of a drafter beside placeholders and layers, on a tiny target."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec.goldens import fill_weights, fixed_values
from tests.tiny_targets import NUM_LAYERS, VOCAB_SIZE, make_tiny
from vllm_mtp.drafter.bound import BoundDrafter, Traced
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.heads import OwnHeads, pick_greedy
from vllm_mtp.drafter.layers import PositionLinear
from vllm_mtp.drafter.layout import block_positions
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.torch_host import block_attention
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import load_frozen
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.torch_host.texts import (
    TextBlocks,
    boundary_of,
    draft_texts,
    forward_texts,
    streams_of,
)

TOKENS = torch.arange(24) * 37 % VOCAB_SIZE
PREFIX_LENS = torch.tensor([1, 4, 5, 12, 19])
K = 4
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture
def target(tiny_llama: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    return model.eval().requires_grad_(False)


@pytest.fixture
def host(target: PreTrainedModel) -> HFTarget:
    return HFTarget(target)


Make = Callable[..., Drafter]


@pytest.fixture
def fresh(tiny_llama: Path) -> Make:
    """Makes float32 drafters as `vllm-mtp init` does."""

    def _make(layers: str, k: int = K, ids: Any = None, **options: Any) -> Drafter:
        settings = DrafterOptions(dtype="float32", **options)
        return new_drafter(tiny_llama, layers, k, settings, ids)

    return _make


@pytest.fixture
def make(fresh: Make) -> Make:
    """The same, without a weight at a start value."""

    def _make(*args: Any, **options: Any) -> Drafter:
        return _random(fresh(*args, **options))

    return _make


def _random(drafter: Drafter) -> Drafter:
    fill_weights(drafter, 0.2, salt="axes ")
    return drafter


def blocks_of(
    host: HFTarget,
    config: DrafterConfig,
    tokens: torch.Tensor = TOKENS,
    prefix_lens: torch.Tensor = PREFIX_LENS,
) -> TextBlocks:
    states = host.encode(tokens, streams=streams_of(config))
    return TextBlocks(tokens, states, prefix_lens)


@torch.no_grad()
def hidden_of(
    host: HFTarget,
    drafter: Drafter,
    tokens: torch.Tensor = TOKENS,
    prefix_lens: torch.Tensor = PREFIX_LENS,
    k: int = K,
    **how: Any,
) -> torch.Tensor:
    text = blocks_of(host, drafter.config, tokens, prefix_lens)
    return forward_texts(BoundDrafter(drafter, host), [text], k, **how)


# --- Weights per position


def _of_one_position(drafter: Drafter, position: int) -> Drafter:
    """The same drafter, with one position's weights in every position."""
    layers = tuple(
        layer.model_copy(update={"per_position": False})
        for layer in drafter.config.layers
    )
    one = Drafter(drafter.config.model_copy(update={"layers": layers}))
    weights = {
        name: tensor[position] if _is_by_position(drafter, name) else tensor
        for name, tensor in drafter.state_dict().items()
    }
    one.load_state_dict(weights)
    return one


def _is_by_position(drafter: Drafter, name: str) -> bool:
    path, _, kind = name.rpartition(".")
    return kind == "down_bias" or isinstance(
        drafter.get_submodule(path), PositionLinear
    )


@pytest.mark.parametrize("form", ["gated", "plain", "square"])
@pytest.mark.parametrize("source", ["block", "boundary"])
def test_weights_per_position_are_those_of_each_position(
    host: HFTarget, make: Make, source: str, form: str
) -> None:
    """Without rows that read each other, a position is what its weights alone give."""
    drafter = make("mlp:2", per_position=True, mlp_form=form, input=source)
    together = hidden_of(host, drafter)
    alone = [hidden_of(host, _of_one_position(drafter, i))[:, i] for i in range(K)]
    torch.testing.assert_close(together, torch.stack(alone, dim=1), **CLOSE)
    assert not torch.isclose(alone[1], hidden_of(host, drafter)[:, 2]).all()


def test_attention_of_layers_per_position_sees_each_rows_own_keys(
    host: HFTarget, make: Make
) -> None:
    """A position's key weights change what that row and those behind it attend to."""
    options = {"boundary_hidden": "all", "bridges": True, "per_position": True}
    drafter = make("own:1", **options)
    before = hidden_of(host, drafter)
    first = hidden_of(host, _of_one_position(drafter, 0))
    torch.testing.assert_close(before[:, 0], first[:, 0], **CLOSE)
    drafter.layers[0].k_proj.weight.data[2] *= -1
    after = hidden_of(host, drafter)
    changed = [[False, False, True, True]] * len(PREFIX_LENS)
    assert (before != after).any(-1).tolist() == changed
    # A draft of fewer positions takes the first ones.
    fewer = hidden_of(host, drafter, k=2)
    torch.testing.assert_close(fewer, after[:, :2], **CLOSE)


def test_new_weights_per_position_begin_as_the_targets_layer(
    host: HFTarget, fresh: Make
) -> None:
    shared, split = (
        fresh("own:0,2", boundary_hidden="all", bridges=True, per_position=p)
        for p in (False, True)
    )
    torch.testing.assert_close(hidden_of(host, split), hidden_of(host, shared), **CLOSE)


# --- What rows read


def test_a_block_alone_reads_nothing_of_the_prefix(host: HFTarget, make: Make) -> None:
    """But where it stands, and the boundary hidden state if it is asked for."""
    other = TOKENS.clone()
    other[:8] = other[:8].flip(0) + 1
    lens = torch.tensor([8])
    plain = make("own:1,own:2", own_attention="block")
    assert plain.config.read_layers == ()
    before = hidden_of(host, plain, prefix_lens=lens)
    assert hidden_of(host, plain, other, lens).equal(before)
    moved = torch.tensor([9])
    same_anchor = torch.cat([TOKENS[:1], TOKENS])
    # RoPE turns queries and keys together: only how far apart they are counts.
    torch.testing.assert_close(
        hidden_of(host, plain, same_anchor, moved), before, **CLOSE
    )
    anchor = TOKENS.clone()
    anchor[8] += 1
    assert (hidden_of(host, plain, anchor, lens) != before).any(-1).all()
    through = make("own:1", own_attention="block", boundary_hidden="all")
    changed = hidden_of(host, through, other, lens)
    assert (changed != hidden_of(host, through, prefix_lens=lens)).any(-1).all()


def test_a_block_alone_attends_as_plain_attention_does(
    host: HFTarget, make: Make
) -> None:
    """Against a dense reference, with the layer's parts by hand."""
    for mask in ("causal", "bidirectional"):
        drafter = make("own:1", own_attention="block", block_mask=mask)
        with torch.no_grad():
            expected = _dense(host, drafter, PREFIX_LENS, reads_prefix=False)
        torch.testing.assert_close(hidden_of(host, drafter), expected, **CLOSE)


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_rows_of_a_block_read_what_the_mask_says(
    host: HFTarget, make: Make, mask: str
) -> None:
    drafter = make("own:1", block_mask=mask)
    with torch.no_grad():
        expected = _dense(host, drafter, PREFIX_LENS)
    before = hidden_of(host, drafter)
    torch.testing.assert_close(before, expected, **CLOSE)
    assert drafter.placeholders is not None
    drafter.placeholders.data[1] += 1.0
    changed = (hidden_of(host, drafter) != before).any(-1)
    read = [mask == "bidirectional"] * 2 + [True, True]
    assert changed.tolist() == [read] * len(PREFIX_LENS)


@pytest.mark.parametrize("layers", ["shared:all", "shared:0,own:2"])
def test_a_bidirectional_block_in_shared_layers(
    host: HFTarget, make: Make, layers: str
) -> None:
    """No row is the target's own: the anchor's reads placeholders too."""
    drafter = make(layers, block_mask="bidirectional")
    before = hidden_of(host, drafter)
    assert before.equal(hidden_of(host, drafter, whole_blocks=True))
    assert drafter.placeholders is not None
    drafter.placeholders.data[2] += 1.0
    assert (hidden_of(host, drafter) != before).any(-1).all()


def _dense(
    host: HFTarget,
    drafter: Drafter,
    prefix_lens: torch.Tensor,
    *,
    reads_prefix: bool = True,
) -> torch.Tensor:
    """One own layer over whole blocks, one block at a time and each row against a
    dense mask. ``[B, k, hidden_size]``."""
    (layer,), text = drafter.layers, blocks_of(host, drafter.config)
    assert drafter.placeholders is not None
    parts = []
    for n in prefix_lens.tolist():
        rows = torch.cat([host.embed(TOKENS[n, None]), drafter.placeholders])
        positions = torch.arange(n, n + len(rows))
        seen = n if reads_prefix else 0
        mask = torch.ones(len(rows), seen + len(rows), dtype=torch.bool)
        if drafter.config.block_mask == "causal":
            mask = mask.tril(seen)
        parts.append(_dense_layer(host, layer, rows, positions, text, seen, mask))
    return torch.stack(parts)


def _dense_layer(
    host: HFTarget,
    layer: Any,
    rows: torch.Tensor,
    positions: torch.Tensor,
    text: TextBlocks,
    num_read: int,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Rows through one own layer and the final norm, in plain torch."""
    index, size = layer.target_layer, layer.head_dim

    def rms(norm: Any, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)

    y = rms(layer.input_norm, rows)
    q, k, v = layer.q_proj(y), layer.k_proj(y), layer.v_proj(y)
    q, k = host.rotate(index, positions, q, k)
    q, k, v = (x.unflatten(-1, (-1, size)).transpose(0, 1) for x in (q, k, v))
    past_keys, past_values = text.states.keys[index], text.states.values[index]
    keys = torch.cat([past_keys[:, :num_read], k], dim=1)
    values = torch.cat([past_values[:, :num_read], v], dim=1)
    attended = F.scaled_dot_product_attention(
        q[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
    )[0]
    x = rows + layer.o_proj(attended.transpose(0, 1).flatten(1))
    z = rms(layer.mlp_norm, x)
    x = x + layer.down_proj(F.silu(layer.gate_proj(z)) * layer.up_proj(z))
    return host.decoder.norm(x)


# Each with something that rows, blocks or texts could be mistaken in.
ALL: dict[str, tuple[str, dict[str, Any]]] = {
    "chain": ("shared:0,own:2", {"chain": True, "boundary_hidden": "all"}),
    "bidirectional": ("shared:0,own:2", {"block_mask": "bidirectional"}),
    "block alone": ("own:1,own:2", {"own_attention": "block"}),
    "positions": ("own:2,mlp:1", {"per_position": True, "boundary_hidden": "all"}),
    "heads": (
        "mlp:2",
        {
            **{"input": "boundary", "per_position": True},
            "boundary_layers": [2, 0],
        },
    ),
    "streams": ("own:0,2", {"boundary_hidden": "all", "boundary_of": "bound"}),
    "extra rows": ("shared:all", {"extra_rows": 2}),
}


@pytest.mark.parametrize("name", ALL)
def test_texts_and_slices_in_one_forward_equal_each_alone(
    name: str, host: HFTarget, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, options = ALL[name]
    drafter = make(layers, **options)
    other, lens = TOKENS.flip(0)[:17], torch.tensor([3, 9])
    alone = [hidden_of(host, drafter), hidden_of(host, drafter, other, lens)]
    for scores in (None, 2 * 16 * K):  # the whole text at once, or two blocks or so
        if scores is not None:
            monkeypatch.setattr(block_attention, "_CPU_SCORES", scores)
        texts = [
            blocks_of(host, drafter.config),
            blocks_of(host, drafter.config, other, lens),
        ]
        with torch.no_grad():
            together = forward_texts(BoundDrafter(drafter, host), texts, K)
        torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("name", ALL)
def test_layers_computed_anew_give_the_same_gradients(
    name: str, host: HFTarget, make: Make
) -> None:
    layers, options = ALL[name]
    drafter = make(layers, **options).requires_grad_(True)
    text = blocks_of(host, drafter.config)

    def gradients(again: bool) -> dict[str, torch.Tensor]:
        bound = BoundDrafter(drafter, host)
        if again:
            bound.layer_call = host.recomputed
        drafter.zero_grad()
        forward_texts(bound, [text], K).square().mean().backward()
        return {n: p.grad for n, p in drafter.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys() == dict(drafter.named_parameters()).keys()
    for weight, gradient in plain.items():
        torch.testing.assert_close(again[weight], gradient, atol=1e-6, rtol=1e-4)


# --- Heads


def test_heads_on_the_boundary_read_no_cache_and_pass_no_second_norm(
    host: HFTarget, fresh: Make
) -> None:
    """New ones pass the target's last hidden state on: each position drafts its last
    token again, as the target's own head says."""
    drafter = fresh("mlp:1", mlp_form="square", per_position=True, input="boundary")
    text = blocks_of(host, drafter.config)
    expected = text.states.hidden[PREFIX_LENS - 1][:, None].expand(-1, K, -1)
    torch.testing.assert_close(hidden_of(host, drafter), expected)
    assert drafter.placeholders is None
    assert drafter.config.bound_layers == ()


def test_behind_layers_that_attend_heads_pass_the_norm(
    host: HFTarget, fresh: Make
) -> None:
    drafter = fresh("own:1", per_position=True, input="boundary", own_init="random")
    text = blocks_of(host, drafter.config)
    entered = text.states.hidden[PREFIX_LENS - 1]
    expected = host.decoder.norm(entered)[:, None].expand(-1, K, -1)
    torch.testing.assert_close(hidden_of(host, drafter), expected, **CLOSE)


@pytest.mark.parametrize("ids", [None, (3, 77, 140, 9)])
def test_own_lm_heads_begin_as_the_targets(
    host: HFTarget, fresh: Make, ids: tuple[int, ...] | None
) -> None:
    same = {"draft_vocab_size": len(ids)} if ids else {}
    own, plain = (
        fresh("own:1", ids=ids, lm_head=head, **same) for head in ("own", "target")
    )
    hidden = hidden_of(host, own)
    rows = host.model.get_output_embeddings().weight
    assert own.lm_heads is not None
    for weight in own.lm_heads.weight:
        assert weight.equal(rows if ids is None else rows[list(ids)])
    ours, its = BoundDrafter(own, host), BoundDrafter(plain, host)
    assert ours.small_head is None  # the target's rows are not kept besides
    torch.testing.assert_close(ours.logits(hidden), its.logits(hidden), **CLOSE)


def test_own_lm_heads_score_each_position_with_its_own(
    host: HFTarget, make: Make
) -> None:
    drafter = make("own:1", lm_head="own")
    bound = BoundDrafter(drafter, host)
    hidden = hidden_of(host, drafter)
    heads = drafter.lm_heads
    assert isinstance(heads, OwnHeads)
    logits = bound.logits(hidden)
    for position in range(K):
        expected = hidden[:, position] @ heads.weight[position].T
        torch.testing.assert_close(logits[:, position], expected, **CLOSE)
    columns = torch.tensor([7, 2])
    some = heads(hidden[:, 1:3], 1, columns)
    torch.testing.assert_close(some, logits[:, 1:3, columns], **CLOSE)


# --- Chains

CHAINS: dict[str, tuple[str, dict[str, Any]]] = {
    "own": ("own:1", {}),
    "everything": (
        "shared:0,own:2,mlp:1",
        {
            "lora_rank": 2,
            "full_rank_modules": ["k_proj"],
            "boundary_hidden": "all",
            "per_position": True,
        },
    ),
}


@pytest.fixture(params=CHAINS)
def chain(request: pytest.FixtureRequest, make: Make) -> Drafter:
    layers, options = CHAINS[request.param]
    return make(layers, chain=True, **options)


def _known_chain(
    host: HFTarget, drafter: Drafter, token_ids: torch.Tensor
) -> torch.Tensor:
    """Last hidden states of chains on given tokens ``[B, k]``."""
    bound, text = BoundDrafter(drafter, host), blocks_of(host, drafter.config)
    positions = block_positions(PREFIX_LENS, K)
    boundary = boundary_of(text, drafter.config)
    with host.reading([(text.states, PREFIX_LENS)], K, chain=True):
        return bound.known_chain(token_ids, positions, boundary)


@torch.no_grad()
def test_a_chain_on_its_own_drafts_computes_what_drafting_did(
    host: HFTarget, chain: Drafter
) -> None:
    bound = BoundDrafter(chain, host)
    seen: dict[int, torch.Tensor] = {}
    bound.trace = seen.__setitem__
    text = blocks_of(host, chain.config)
    drafts, _ = draft_texts(bound, [text], K, pick_greedy)
    assert seen[Traced.DRAFTS].equal(drafts)
    tokens = torch.cat([TOKENS[PREFIX_LENS][:, None], drafts[:, :-1]], dim=1)
    hidden = _known_chain(host, chain, tokens)
    drafted = seen[Traced.FINAL_NORM].unflatten(0, (-1, K))
    torch.testing.assert_close(hidden, drafted, **CLOSE)
    bound.trace = None
    again = bound.draft(hidden, pick_greedy)[0]
    assert again.equal(drafts)
    assert len(drafts.unique()) > 1


@torch.no_grad()
def test_a_row_of_a_chain_reads_the_rows_before_it(
    host: HFTarget, chain: Drafter
) -> None:
    tokens = torch.arange(len(PREFIX_LENS) * K).unflatten(0, (-1, K)) * 11
    before = _known_chain(host, chain, tokens)
    for position in range(K):
        other = tokens.clone()
        other[:, position] += 1
        changed = (_known_chain(host, chain, other) != before).any(-1)
        expected = [i >= position for i in range(K)]
        assert changed.tolist() == [expected] * len(PREFIX_LENS)


@torch.no_grad()
def test_a_chain_attends_to_its_rows_beside_their_hidden_state(
    host: HFTarget, make: Make
) -> None:
    """Row 2 reads keys of row 0, also where nothing else of it comes through."""
    chain = make("own:1", chain=True)
    assert chain.chain is not None
    half = chain.chain.fuse.weight.shape[0]
    chain.chain.fuse.weight[:, half:] = 0.0  # no hidden state enters a row
    tokens = torch.arange(len(PREFIX_LENS) * K).unflatten(0, (-1, K)) * 11
    before = _known_chain(host, chain, tokens)
    tokens[:, 0] += 1
    assert (_known_chain(host, chain, tokens) != before).any(-1).all()


@pytest.mark.parametrize("window", [None, 6])
@torch.no_grad()
def test_a_chain_equals_a_dense_reference(window: int | None, tmp_path: Path) -> None:
    """Also where the layer reads its last tokens alone, those of the chain included."""
    folder = make_tiny("mistral", tmp_path, sliding_window=window)
    host = HFTarget(load_frozen(folder, "float32", "cpu"))
    options = DrafterOptions(dtype="float32", chain=True)
    chain = _random(new_drafter(folder, "own:1", K, options))
    tokens = torch.arange(len(PREFIX_LENS) * K).unflatten(0, (-1, K)) * 11
    got = _known_chain(host, chain, tokens)
    text = blocks_of(host, chain.config)
    (layer,), fuse = chain.layers, chain.chain
    assert fuse is not None
    for block, n in enumerate(PREFIX_LENS.tolist()):
        h, rows = text.states.hidden[n - 1], []
        for i in range(K):
            token = host.embed(tokens[block, i, None])[0]
            halves = [
                F.rms_norm(x, x.shape, norm.weight, norm.eps)
                for x, norm in ((token, fuse.token_norm), (h, fuse.hidden_norm))
            ]
            rows.append(fuse.fuse.weight @ torch.cat(halves))
            size = i + 1
            mask = torch.ones(size, n + size, dtype=torch.bool).tril(n)
            if window is not None:
                mask = mask.triu(n + 1 - window)
            positions = torch.arange(n, n + size)
            stacked = torch.stack(rows)
            out = _dense_layer(host, layer, stacked, positions, text, n, mask)
            h = out[-1]
            torch.testing.assert_close(got[block, i], h, **CLOSE)


def test_gradients_reach_every_weight_of_a_chain(
    host: HFTarget, chain: Drafter
) -> None:
    chain.requires_grad_(True)
    text = blocks_of(host, chain.config)
    hidden = forward_texts(BoundDrafter(chain, host), [text], K)
    hidden[:, -1].square().mean().backward()  # of the last row alone
    # The last row comes by way of all others, but through weights of its own.
    for name, weight in chain.named_parameters():
        assert weight.grad is not None, name
        if _is_by_position(chain, name):
            assert (weight.grad.flatten(1).abs().sum(1) > 0).all(), name
        assert weight.grad.abs().sum() > 0, name


@torch.no_grad()
def test_changes_act_on_all_rows_of_a_chain_but_the_first(
    host: HFTarget, make: Make
) -> None:
    tokens = torch.arange(len(PREFIX_LENS) * K).unflatten(0, (-1, K)) * 11
    chain = make("shared:1", chain=True, lora_rank=2)
    before = _known_chain(host, chain, tokens)
    for pair in chain.layers[0].lora.values():
        pair.b *= -1
    changed = (_known_chain(host, chain, tokens) != before).any(-1)
    assert changed.tolist() == [[False, True, True, True]] * len(PREFIX_LENS)


# --- Extra rows


@pytest.mark.parametrize("layers", ["shared:all", "shared:0,own:2"])
def test_extra_rows_stand_at_the_anchor(
    host: HFTarget, make: Make, layers: str
) -> None:
    drafter = make(layers, extra_rows=2, lora_rank=2)
    bound, text = BoundDrafter(drafter, host), blocks_of(host, drafter.config)
    seen: dict[int, torch.Tensor] = {}
    bound.trace = seen.__setitem__
    with torch.no_grad():
        forward_texts(bound, [text], K, whole_blocks=True)
    n = PREFIX_LENS[:, None]
    expected = n + torch.tensor([0, 0, 0, 1, 2, 3])
    assert seen[Traced.POSITIONS].equal(expected)
    rows = seen[Traced.INPUT].unflatten(0, (len(PREFIX_LENS), -1))
    assert drafter.extra_rows is not None
    assert rows[:, 1:3].equal(drafter.extra_rows.expand(len(PREFIX_LENS), -1, -1))


def test_extra_rows_leave_the_anchor_exact(
    target: PreTrainedModel, host: HFTarget, make: Make
) -> None:
    """And what is behind them reads them, with and without the shortcut."""
    drafter = make("shared:all", extra_rows=2, lora_rank=2)
    whole = hidden_of(host, drafter, whole_blocks=True)
    torch.testing.assert_close(hidden_of(host, drafter), whole, **CLOSE)
    logits = target(TOKENS[None]).logits[0, PREFIX_LENS]
    assert host.logits(whole[:, 0]).argmax(-1).equal(logits.argmax(-1))
    assert drafter.extra_rows is not None
    for row in range(2):
        drafter.extra_rows.data[row] += 1.0
        for how in (True, False):
            changed = (hidden_of(host, drafter, whole_blocks=how) - whole).abs()
            assert changed[:, 0].max() < 1e-4
            assert changed[:, 1:].amax(-1).min() > 1e-4
        whole = hidden_of(host, drafter, whole_blocks=True)


def test_fewer_positions_keep_the_extra_rows(host: HFTarget, make: Make) -> None:
    drafter = make("shared:0,own:2", extra_rows=3)
    torch.testing.assert_close(
        hidden_of(host, drafter, k=2), hidden_of(host, drafter)[:, :2], **CLOSE
    )


# --- Streams of the target's inside


def _expected_boundary(
    target: PreTrainedModel, weights: dict[int, float]
) -> torch.Tensor:
    """The mix at each prefix's last token, from transformers' own hidden states."""
    found: dict[int, torch.Tensor] = {}
    layers = target.get_decoder().layers
    hooks = [
        layers[i].register_forward_hook(
            lambda _m, _a, out, i=i: found.__setitem__(
                i, out[0] if isinstance(out, tuple) else out
            )
        )
        for i in weights
    ]
    with torch.no_grad():
        target(TOKENS[None])
        norm = target.get_decoder().norm
        mix = sum(w * norm(found[i].flatten(0, -2)) for i, w in weights.items())
    for hook in hooks:
        hook.remove()
    assert isinstance(mix, torch.Tensor)
    return mix[PREFIX_LENS - 1]


@pytest.mark.parametrize("streams", [[2], [2, 0], [0, 1, NUM_LAYERS - 1]])
def test_the_mix_is_a_softmax_of_normed_streams(
    target: PreTrainedModel, host: HFTarget, make: Make, streams: list[int]
) -> None:
    heads = {"mlp_form": "square", "per_position": True, "input": "boundary"}
    drafter = make("mlp:1", boundary_layers=streams, **heads)
    assert (drafter.boundary_mix is None) == (len(streams) == 1)
    weights = [1.0]
    if drafter.boundary_mix is not None:
        weights = drafter.boundary_mix.softmax(0).tolist()
    # Heads that add nothing pass on what they read.
    drafter.layers[0].proj.weight.data.zero_()
    drafter.layers[0].proj.bias.data.zero_()
    mix = dict(zip(streams, weights, strict=True))
    expected = _expected_boundary(target, mix)[:, None].expand(-1, K, -1)
    torch.testing.assert_close(hidden_of(host, drafter), expected, **CLOSE)


def test_layers_read_the_stream_of_their_own_target_layer(
    target: PreTrainedModel, host: HFTarget, make: Make
) -> None:
    """With the mix read by another layer, and a source that both name only once."""
    drafter = make("own:0,2", boundary_hidden="all", boundary_of="bound")
    bound, text = BoundDrafter(drafter, host), blocks_of(host, drafter.config)
    assert drafter.config.boundary_sources == (0, 2)
    read = bound.read_boundary(boundary_of(text, drafter.config))
    assert read.last is None
    for layer in drafter.layers:
        expected = _expected_boundary(target, {layer.target_layer: 1.0})
        got = bound.boundary_of_layer(layer, read.of_layers)
        torch.testing.assert_close(got, expected, **CLOSE)


def test_a_mix_and_a_bound_stream_in_one_drafter(
    target: PreTrainedModel, host: HFTarget, make: Make
) -> None:
    drafter = make("own:0,2", boundary_hidden="all", boundary_layers=[2, 1])
    layers = list(drafter.config.layers)
    layers[1] = layers[1].model_copy(update={"boundary_of": "bound"})
    config = drafter.config.model_copy(update={"layers": tuple(layers)})
    assert config.boundary_sources == (2, 1)
    mixed = _random(Drafter(config))
    assert mixed.boundary_mix is not None
    a, b = mixed.boundary_mix.softmax(0).tolist()
    bound, text = BoundDrafter(mixed, host), blocks_of(host, config)
    read = bound.read_boundary(boundary_of(text, config))
    for layer, mix in zip(mixed.layers, ({2: a, 1: b}, {2: 1.0}), strict=True):
        torch.testing.assert_close(
            bound.boundary_of_layer(layer, read.of_layers),
            _expected_boundary(target, mix),
            **CLOSE,
        )


def test_gradients_reach_the_mix_and_extra_rows(host: HFTarget, make: Make) -> None:
    drafter = make(
        "own:0,2", boundary_hidden="first", boundary_layers=[3, 1], extra_rows=2
    ).requires_grad_(True)
    text = blocks_of(host, drafter.config)
    forward_texts(BoundDrafter(drafter, host), [text], K).square().mean().backward()
    for name, weight in drafter.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


# --- Full-rank changes

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_new_full_rank_changes_change_nothing(host: HFTarget, fresh: Make) -> None:
    plain = hidden_of(host, fresh("shared:0,2"))
    changed = fresh("shared:0,2", full_rank_modules=MODULES)
    assert hidden_of(host, changed).equal(plain)


@pytest.mark.parametrize("module", MODULES)
def test_a_full_rank_change_is_lora_of_the_same_product(
    host: HFTarget, fresh: Make, module: str
) -> None:
    low = fresh("shared:0,2", lora_rank=5, lora_modules=[module])
    full = fresh("shared:0,2", full_rank_modules=[module])
    plain = hidden_of(host, full, whole_blocks=True)
    for ours, its in zip(full.layers, low.layers, strict=True):
        pair, change = its.lora[module], ours.full_rank[module]
        pair.b.data = fixed_values(module, pair.b.shape, 0.3)
        change.weight.data = pair.scale * pair.b @ pair.a
    changed = hidden_of(host, full, whole_blocks=True)
    expected = hidden_of(host, low, whole_blocks=True)
    torch.testing.assert_close(changed, expected, **CLOSE)
    rows = (changed != plain).any(-1)
    assert rows.tolist() == [[False, True, True, True]] * len(PREFIX_LENS)


def test_the_target_stays_as_it_is(
    target: PreTrainedModel, host: HFTarget, make: Make
) -> None:
    before = {name: w.clone() for name, w in target.named_parameters()}
    hidden_of(host, make("shared:all", full_rank_modules=MODULES))
    assert all(w.equal(before[name]) for name, w in target.named_parameters())
    assert isinstance(target.get_decoder().layers[0].mlp.up_proj, nn.Linear)
