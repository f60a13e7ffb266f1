# SPDX-License-Identifier: Apache-2.0
"""Targets that the torch host follows exactly, and those that it refuses at once."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

from tests.tiny_targets import LONG_ROPE, VOCAB_SIZE, make_tiny
from vllm_mtp.drafter.layers import Stream
from vllm_mtp.drafter.target_facts import long_rope_from
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.torch_host.block_attention import (
    Scoring,
    attend_blocks,
    block_slices,
)
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.layer_attention import InLayer, _attend_in_layer
from vllm_mtp.torch_host.load import load_frozen

LoadTiny = Callable[..., PreTrainedModel]


@pytest.fixture
def load(tmp_path: Path) -> LoadTiny:
    """Makes a tiny target and loads it."""

    def _load(family: str, **overrides: Any) -> PreTrainedModel:
        folder = make_tiny(family, tmp_path / family, **overrides)
        model = AutoModelForCausalLM.from_pretrained(folder)
        return model.eval().requires_grad_(False)

    return _load


def tokens(count: int) -> torch.Tensor:
    return torch.arange(count) * 37 % VOCAB_SIZE


def shared_all(host: HFTarget, ids: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    """Hidden states of blocks of one row, by all layers of the target. ``[B, h]``."""
    states = host.encode(ids)
    with host.reading([(states, lens)], 1), torch.no_grad():
        stream = Stream(host.embed(ids[lens]))
        for index in range(len(host.decoder.layers)):
            stream = host.run_layer(host.layer(index), index, stream, lens)
        return host.final_norm(stream)


class TestLogitScale:
    def test_logits_are_the_targets(self, load: LoadTiny) -> None:
        model = load("cohere2")
        host, ids = HFTarget(model), tokens(12)
        with torch.no_grad():
            expected = model(ids[None]).logits[0]
        hidden = host.encode(ids).hidden
        torch.testing.assert_close(host.logits(hidden), expected)
        some = torch.tensor([3, 200, 511])
        torch.testing.assert_close(
            host.logits_of_tokens(some)(hidden), expected[:, some]
        )


class TestSinks:
    def test_they_take_their_share_of_the_weights(self) -> None:
        generator = torch.Generator().manual_seed(0)
        heads, kv_heads, size, prefix_len, k = 4, 2, 8, 5, 3
        query = torch.randn(heads, k, size, generator=generator)
        key, value = torch.randn(2, kv_heads, k, size, generator=generator)
        past = torch.randn(2, kv_heads, prefix_len, size, generator=generator)
        sinks = torch.tensor([-1.0, 0.0, 1.0, 3.0])
        slices = block_slices(torch.tensor([prefix_len]), k, heads)
        found = attend_blocks(query, key, value, *past, slices, Scoring(0.5, sinks))
        keys = torch.cat([past[0], key], 1).repeat_interleave(2, 0)
        values = torch.cat([past[1], value], 1).repeat_interleave(2, 0)
        for head in range(heads):
            for row in range(k):
                seen = prefix_len + row + 1
                scores = keys[head, :seen] @ query[head, row] * 0.5
                weights = scores.exp() / (scores.exp().sum() + sinks[head].exp())
                expected = weights @ values[head, :seen]
                ours = found[row].unflatten(0, (heads, size))[head]
                torch.testing.assert_close(ours, expected)

    def test_own_layers_read_with_those_of_their_target_layer(
        self, load: LoadTiny
    ) -> None:
        """As in vLLM, where they belong to the layer's `Attention`."""
        model = load("gpt_oss")
        host, ids = HFTarget(model), tokens(12)
        states, lens = host.encode(ids), torch.tensor([8])
        rows = torch.ones(1, 128), torch.ones(1, 64), torch.ones(1, 64)
        with host.reading([(states, lens)], 1):
            before = host.attend(1, *rows)
        model.get_decoder().layers[1].self_attn.sinks.fill_(50.0)  # takes all
        host = HFTarget(model)
        with host.reading([(states, lens)], 1):
            after = host.attend(1, *rows)
        assert before.abs().max() > 1e-2
        assert after.abs().max() < 1e-6


class TestRoPE:
    @pytest.mark.parametrize("family", ["cohere2", "exaone4"])
    def test_own_layers_are_rotated_where_the_target_is(
        self, family: str, load: LoadTiny
    ) -> None:
        host = HFTarget(load(family))
        query, key, at = torch.ones(1, 128), torch.ones(1, 64), torch.tensor([7])
        rotated = [not host.rotate(i, at, query, key)[1].equal(key) for i in range(4)]
        assert rotated == [True, False, True, True]

    def test_longrope_is_the_same_for_all_rows_of_a_text(self, load: LoadTiny) -> None:
        """Also where all blocks stand below the length that it was made for first."""
        model = load("phi3_longrope")
        host, ids = HFTarget(model), tokens(80)
        lens = torch.arange(5, 21)
        found, expected = shared_all(host, ids, lens), host.encode(ids).hidden
        torch.testing.assert_close(found, expected[lens], atol=1e-4, rtol=1e-4)
        alone = host.encode(ids[:21]).hidden  # a text that is shorter than that length
        torch.testing.assert_close(alone, expected[:21], atol=1e-4, rtol=1e-4)

    def test_longrope_takes_the_long_factors_of_the_target(
        self, load: LoadTiny
    ) -> None:
        long = load("phi3_longrope")
        with torch.no_grad():
            expected = long.get_decoder()(tokens(80)[None]).last_hidden_state[0]
        found = HFTarget(long).encode(tokens(80)).hidden
        torch.testing.assert_close(found, expected)

    def test_longrope_of_a_model_of_the_first_length_stays_short(
        self, load: LoadTiny
    ) -> None:
        short = load("phi3_longrope", max_position_embeddings=32)
        assert long_rope_from(short.config) is None
        with torch.no_grad():
            expected = short.get_decoder()(tokens(20)[None]).last_hidden_state[0]
        host = HFTarget(short)
        torch.testing.assert_close(host.encode(tokens(20)).hidden, expected)
        longer = host.encode(tokens(80)).hidden[:20]
        torch.testing.assert_close(longer, expected, atol=1e-4, rtol=1e-4)

    def test_the_least_length_with_long_factors(self, load: LoadTiny) -> None:
        assert long_rope_from(load("phi3_longrope").config) == 33
        assert LONG_ROPE["original_max_position_embeddings"] == 32
        assert long_rope_from(load("phi3").config) is None

    def test_dynamic_scaling_is_that_of_a_short_text(self, load: LoadTiny) -> None:
        """vLLM's never scales, transformers' does behind the first length."""
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        dynamic = load("llama", rope_parameters=rope, max_position_embeddings=64)
        short = HFTarget(dynamic).encode(tokens(150)).hidden[:60]
        with torch.no_grad():
            expected = load("llama").get_decoder()(tokens(60)[None]).last_hidden_state
        torch.testing.assert_close(short, expected[0], atol=1e-4, rtol=1e-4)


class TestFollowed:
    def test_scaled_embeddings(self, load: LoadTiny) -> None:
        model = load("llama")
        forward = model.get_decoder().forward

        def scaled(input_ids: torch.Tensor, **settings: Any) -> Any:
            embedded = model.get_input_embeddings()(input_ids)
            return forward(**settings | {"inputs_embeds": embedded * 30.0})

        ids = tokens(3)
        before = HFTarget(model).embed(ids)
        model.get_decoder().forward = scaled
        torch.testing.assert_close(HFTarget(model).embed(ids), before * 30.0)

    @pytest.mark.parametrize("family", ["qwen3_next", "nemotron_h"])
    def test_hybrids_keep_what_their_attention_read(
        self, family: str, load: LoadTiny
    ) -> None:
        host = HFTarget(load(family))
        states = host.encode(tokens(60))
        assert sorted(states.keys) == [1, 3]
        assert states.keys[3].shape == (2, 60, 32)


def _with_half_the_hidden_states(_: Any, __: Any, out: Any) -> Any:
    out.last_hidden_state = out.last_hidden_state * 0.5
    return out


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, "gptqmodel"),
        ({"quant_method": "gptq", "bits": 4, "dataset": "c4"}, "optimum"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
    ],
)
def test_a_quantised_target_names_the_package_that_it_needs(
    settings: dict[str, Any], package: str, tmp_path: Path
) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip("is installed")
    folder = make_tiny("llama", tmp_path / "target")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UnsupportedTargetError, match=package) as error:
        load_frozen(folder, "float32", "cpu")
    assert "\n" not in str(error.value)


class TestRefused:
    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"logit_bias": 5.0}, "logit_bias=5.0"),
            ({"alibi": torch.ones(4)}, "alibi"),
            ({"sliding_window": 7}, "sliding_window=7"),
            ({"is_causal": False}, "is_causal=False"),
            ({"dropout": 0.1}, "dropout=0.1"),
        ],
    )
    def test_what_attention_is_given_and_the_host_does_not_know(
        self, given: dict[str, Any], named: str, load: LoadTiny
    ) -> None:
        attention = load("llama").get_decoder().layers[0].self_attn
        heads = (
            torch.ones(1, 4, 2, 32),
            torch.ones(1, 2, 2, 32),
            torch.ones(1, 2, 2, 32),
        )
        stand_in = InLayer(lambda query, *_: query.transpose(0, 1).flatten(1), None)
        _attend_in_layer(attention, *heads, stand_in, 1.0, logit_bias=None)
        with pytest.raises(UnsupportedTargetError, match=f"gives its .* {named}"):
            _attend_in_layer(attention, *heads, stand_in, 1.0, **given)

    def test_a_window_that_no_text_reaches_is_none(self, load: LoadTiny) -> None:
        HFTarget(load("mistral", sliding_window=512, max_position_embeddings=512))

    def test_something_in_front_of_the_layers(self, load: LoadTiny) -> None:
        model = load("llama")
        forward = model.get_decoder().forward

        def moved(input_ids: torch.Tensor, **settings: Any) -> Any:
            embedded = model.get_input_embeddings()(input_ids)
            return forward(**settings | {"inputs_embeds": embedded + 1.0})

        HFTarget(model)  # good before
        model.get_decoder().forward = moved
        with pytest.raises(UnsupportedTargetError, match="enters its layers differ by"):
            HFTarget(model)

    def test_something_between_the_layers(self, load: LoadTiny) -> None:
        model = load("llama")
        model.get_decoder().layers[2].register_forward_pre_hook(
            lambda _, args: (args[0] * 0.5, *args[1:])
        )
        with pytest.raises(UnsupportedTargetError, match="between its layers 1 and 2"):
            HFTarget(model)

    def test_something_behind_the_last_norm(self, load: LoadTiny) -> None:
        model = load("llama")
        model.get_decoder().register_forward_hook(_with_half_the_hidden_states)
        with pytest.raises(UnsupportedTargetError, match="its last hidden states"):
            HFTarget(model)

    def test_a_layer_that_is_given_something_of_the_text(self, load: LoadTiny) -> None:
        model = load("llama")
        layer = model.get_decoder().layers[1]
        forward = layer.forward

        def more(hidden_states: Any, extra: Any = None, **settings: Any) -> Any:
            return forward(hidden_states, **settings)

        layer.forward = more
        layer.register_forward_pre_hook(
            lambda _, args, given: (args, given | {"extra": args[0]}), with_kwargs=True
        )
        with pytest.raises(UnsupportedTargetError, match="gives its layers extra"):
            HFTarget(model)

    def test_something_behind_the_head(self, load: LoadTiny) -> None:
        model = load("llama")
        forward = model.forward

        def scaled(*args: Any, **settings: Any) -> Any:
            out = forward(*args, **settings)
            out.logits = out.logits * 3.0
            return out

        model.forward = scaled
        with pytest.raises(UnsupportedTargetError, match="its logits differ by 0.67"):
            HFTarget(model)

    def test_a_model_that_cannot_be_run(self, load: LoadTiny) -> None:
        model = load("llama")

        def broken(*_: Any, **__: Any) -> Any:
            raise IndexError("two\nlines")

        model.get_decoder().layers[2].forward = broken
        with pytest.raises(
            UnsupportedTargetError, match="IndexError: two lines.*another"
        ) as error:
            HFTarget(model)
        assert "\n" not in str(error.value)
