# SPDX-License-Identifier: Apache-2.0
"""New drafters: what they are made of, and what they do before training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3NextConfig
from transformers.models.auto import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from checkpoints_spec.goldens import run_blocks
from tests.tiny_targets import NUM_LAYERS, make_tiny
from vllm_mtp.drafter.checkpoint import load_drafter, save_drafter
from vllm_mtp.drafter.config import LoRAConfig, OwnLayerConfig, SharedLayerConfig
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.errors import LayerSpecError, UnsupportedTargetError
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import load_frozen
from vllm_mtp.torch_host.new_drafter import DrafterOptions, TargetWeights, new_drafter

LORA = LoRAConfig(rank=2, alpha=4.0, modules=("q_proj", "down_proj"))
WITH_LORA: dict[str, Any] = {"lora_rank": 2, "lora_modules": ["q_proj", "down_proj"]}
SOURCES = {
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{name: f"self_attn.{name}" for name in ("q_norm", "k_norm")},
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}


def make(
    folder: Path,
    layers: str,
    num_draft_tokens: int = 3,
    draft_token_ids: Sequence[int] | None = None,
    **options: Any,
) -> Drafter:
    settings = DrafterOptions(**{"dtype": "float32"} | options)
    return new_drafter(folder, layers, num_draft_tokens, settings, draft_token_ids)


@pytest.fixture(params=["tiny_llama", "tiny_qwen3"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


class TestConfig:
    def test_layers_as_listed(self, tiny_llama: Path) -> None:
        config = make(tiny_llama, "shared:0,1,own:3", **WITH_LORA).config
        assert config.layers == (
            SharedLayerConfig(target_layer=0, lora=LORA),
            SharedLayerConfig(target_layer=1, lora=LORA),
            OwnLayerConfig(target_layer=3, intermediate_size=96, rms_norm_eps=1e-6),
        )
        assert config.target == TargetFacts.from_folder(tiny_llama)
        assert config.num_speculative_tokens == 3

    def test_own_copies_have_what_the_target_has(
        self, tiny_qwen3: Path, tmp_path: Path
    ) -> None:
        layer = make(tiny_qwen3, "own:0").config.layers[0]
        assert isinstance(layer, OwnLayerConfig)
        assert (layer.qk_norm, layer.qkv_bias) == (True, False)
        layer = make(tiny_qwen3, "own:0", own_init="random").config.layers[0]
        assert isinstance(layer, OwnLayerConfig)
        assert (layer.qk_norm, layer.qkv_bias) == (False, False)

    def test_options(self, tiny_llama: Path) -> None:
        drafter = make(
            tiny_llama,
            "own:0",
            boundary_hidden="all",
            markov_rank=5,
            draft_token_ids=(9, 2, 4),
            dtype="bfloat16",
        )
        assert drafter.config.uses_boundary_hidden
        assert drafter.config.markov is not None
        assert drafter.config.markov.rank == 5
        assert drafter.config.draft_vocab_size == 3
        assert drafter.draft_vocab is not None
        assert drafter.draft_vocab.token_ids.tolist() == [9, 2, 4]
        assert {weight.dtype for weight in drafter.parameters()} == {torch.bfloat16}

    def test_no_options_no_heads(self, tiny_llama: Path) -> None:
        config = make(tiny_llama, "shared:0").config
        assert config.markov is None
        assert config.draft_vocab_size is None
        assert not config.uses_boundary_hidden


class TestStartValues:
    def test_own_layers_are_copies(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        drafter = make(folder, "own:3,1")
        for index, target_layer in enumerate((3, 1)):
            own = dict(drafter.layers[index].named_parameters())
            prefix = f"model.layers.{target_layer}."
            assert len(own) == sum(name.startswith(prefix) for name in weights)
            for name, weight in own.items():
                module, _, kind = name.partition(".")
                assert weight.equal(weights[f"{prefix}{SOURCES[module]}.{kind}"]), name

    def test_placeholders_are_the_mean_embedding(self, tiny_llama: Path) -> None:
        embeddings = load_file(tiny_llama / "model.safetensors")[
            "model.embed_tokens.weight"
        ]
        placeholders = make(tiny_llama, "shared:0", 4).placeholders
        assert placeholders is not None
        torch.testing.assert_close(
            placeholders.detach(), embeddings.mean(0).expand(3, -1)
        )

    def test_placeholders_are_what_enters_the_first_layer(self, tmp_path: Path) -> None:
        """Gemma scales its embeddings."""
        folder = make_tiny("gemma3", tmp_path)
        embed = _load(folder).get_input_embeddings()
        placeholders = make(folder, "shared:0", 4).placeholders
        assert placeholders is not None
        torch.testing.assert_close(
            placeholders.detach(), embed(torch.arange(512)).mean(0).expand(3, -1)
        )

    def test_one_place_has_no_placeholders(self, tiny_llama: Path) -> None:
        assert make(tiny_llama, "shared:0", 1).placeholders is None

    def test_random_layers_pass_their_input_through(self, folder: Path) -> None:
        """Also with the boundary hidden state and Markov correction, which start
        at zero."""
        drafter = make(
            folder,
            "own:all",
            own_init="random",
            boundary_hidden="all",
            markov_rank=2,
        )
        target = _load(folder)
        tokens = torch.arange(12) * 31
        prefix_lens = torch.tensor([3, 11])
        with torch.no_grad():
            blocks = run_blocks(target, drafter, tokens, prefix_lens, 3)
            anchors = target.get_input_embeddings()(tokens[prefix_lens])
            assert drafter.placeholders is not None
            inputs = torch.cat(
                [anchors[:, None], drafter.placeholders.expand(2, -1, -1)], dim=1
            )
            expected = target.get_decoder().norm(inputs)
            logits = target.get_output_embeddings()(expected)
        torch.testing.assert_close(blocks.hidden, expected)
        torch.testing.assert_close(blocks.scores, logits)

    def test_random_weights_depend_on_the_seed_only(self, tiny_llama: Path) -> None:
        def start(seed: int) -> dict[str, torch.Tensor]:
            return make(
                tiny_llama,
                "shared:0,own:1",
                own_init="random",
                **WITH_LORA,
                markov_rank=2,
                seed=seed,
            ).state_dict()

        first, again, other = start(1), start(1), start(2)
        assert all(first[name].equal(again[name]) for name in first)
        for name in ("layers.0.lora.q_proj.a", "layers.1.q_proj.weight"):
            assert not first[name].equal(other[name])

    @pytest.mark.parametrize("own_init", ["copy", "random"])
    def test_no_value_is_left_open(
        self, folder: Path, tmp_path: Path, own_init: str
    ) -> None:
        """All weights are finite, and the folder can be loaded."""
        drafter = make(
            folder,
            "shared:0,own:1",
            own_init=own_init,
            **WITH_LORA,
            markov_rank=2,
            boundary_hidden="all",
            draft_token_ids=(5, 3),
        )
        loaded = load_drafter(save_drafter(drafter, tmp_path))
        assert loaded.config == drafter.config


class TestRefusals:
    @pytest.mark.parametrize("layers", ["", "3", "own:4", "shared:2-1"])
    def test_layer_lists(self, tiny_llama: Path, layers: str) -> None:
        with pytest.raises(LayerSpecError, match="--layers"):
            make(tiny_llama, layers)

    def test_layers_that_cannot_be_copied(self, tmp_path: Path) -> None:
        # Its MLP is a mixture of experts.
        odd = make_tiny("qwen3_moe", tmp_path / "odd")
        with pytest.raises(UnsupportedTargetError) as caught:
            make(odd, "shared:0,own:2")
        assert "have parts that an own layer does not have" in str(caught.value)
        assert "(a mixture of experts)" in str(caught.value)
        assert "--own-init random" in str(caught.value)
        drafter = make(odd, "shared:0,own:2", own_init="random")
        assert len(drafter.layers) == 2
        assert isinstance(drafter.config.layers[1], OwnLayerConfig)
        assert drafter.config.layers[1].intermediate_size == 96

    def test_a_layer_that_does_something_else(
        self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A made-up family, with the names and shapes of another."""
        forward = LlamaMLP.forward
        monkeypatch.setattr(LlamaMLP, "forward", lambda *args: forward(*args) * 0.5)
        with pytest.raises(
            UnsupportedTargetError,
            match="LlamaDecoderLayer.* cannot be copied .* what follows attention",
        ):
            make(tiny_llama, "own:2")
        monkeypatch.undo()
        forward = LlamaAttention.forward
        monkeypatch.setattr(
            LlamaAttention,
            "forward",
            lambda self, hidden_states, *args, **rest: forward(
                self, hidden_states * 0.5, *args, **rest
            ),
        )
        with pytest.raises(UnsupportedTargetError, match="first in: queries"):
            make(tiny_llama, "own:2")

    def test_targets_without_safetensors(
        self, tiny_llama: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_bytes(
            (tiny_llama / "config.json").read_bytes()
        )
        with pytest.raises(
            UnsupportedTargetError, match="shaped like an input embedding"
        ):
            make(tmp_path, "shared:all")


def test_target_weights_are_found_in_all_shards(
    tiny_llama: Path, tmp_path: Path
) -> None:
    _load(tiny_llama).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    facts = TargetFacts.from_folder(tiny_llama)
    whole, parts = TargetWeights(tiny_llama, facts), TargetWeights(tmp_path, facts)
    assert parts.mean_embedding().equal(whole.mean_embedding())
    for index in range(NUM_LAYERS):
        layer = whole.layer(index)
        assert len(layer) == 9
        assert layer.keys() == parts.layer(index).keys()
        assert all(layer[name].equal(parts.layer(index)[name]) for name in layer)
    assert whole.layer(NUM_LAYERS) == {}
    assert whole.get("no.such.tensor") is None


class TestRefusedTargets:
    """Each in one line, before any weight is read."""

    def _refusal(
        self, config: PreTrainedConfig, folder: Path, layers: str, **options: Any
    ) -> str:
        config.save_pretrained(folder)
        with pytest.raises(UnsupportedTargetError) as error:
            make(folder, layers, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_layers_without_a_cache(self, tmp_path: Path) -> None:
        """Of a hybrid; those with attention are named."""
        config = Qwen3NextConfig(num_hidden_layers=8)
        text = self._refusal(config, tmp_path, "shared:all")
        assert "layers [0, 1, 2, 4, 5, 6] have no keys and values" in text
        assert "bind to [3, 7]" in text


# Families whose layers are dense, with what a copy of one needs.
COPIED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "phi3": {},
    "smollm3": {},
    "seed_oss": {"qkv_bias": True},
    "ernie4_5": {},
    "granite": {},
    "gemma2": {"norm_placement": "around", "activation": "gelu_tanh"},
    "gemma3": {"norm_placement": "around", "activation": "gelu_tanh", "qk_norm": True},
    "gemma3_mm": {
        "norm_placement": "around",
        "activation": "gelu_tanh",
        "qk_norm": True,
    },
    "gemma4": {
        "norm_placement": "around",
        "activation": "gelu_tanh",
        "qk_norm": True,
        "v_norm": True,
        "output_scale": True,
    },
    "glm4": {"norm_placement": "around", "qkv_bias": True},
    "exaone4": {"norm_placement": "after", "qk_norm": True},
    "olmo3": {"norm_placement": "after", "qk_norm": True, "qk_norm_whole": True},
    "cohere2": {"norm": "layer", "parallel": True},
    "qwen3_5": {"qk_norm": True, "output_gate": True},
    "qwen2_5_vl": {"qkv_bias": True},
    "qwen3_vl": {"qk_norm": True},
    "llava": {},
    "mistral": {},
    "mistral3": {},
    "llama_dynamic": {},
    "llama_yarn": {},
    "phi3_longrope": {},
    "glm_ocr": {"norm_placement": "around"},
}


@pytest.mark.parametrize("family", COPIED)
def test_a_copy_is_the_target_layer(family: str, tmp_path: Path) -> None:
    """All layers of a target as own layers draft what the target says."""
    folder = make_tiny(family, tmp_path / family)
    host = HFTarget(load_frozen(folder, "float32", "cpu"))
    layers = sorted(host.encode(torch.arange(9)).keys)
    drafter = make(folder, "own:" + ",".join(map(str, layers)), 1)
    for layer in drafter.config.layers:
        assert isinstance(layer, OwnLayerConfig)
        form = layer.model_dump(exclude_defaults=True)
        assert {
            name: value
            for name, value in form.items()
            if name not in ("target_layer", "intermediate_size", "rms_norm_eps")
        } == COPIED[family]
    if len(layers) < NUM_LAYERS:
        return  # the other layers of a hybrid cannot be drafted with
    ids, lens = torch.arange(40) * 31 % 500, torch.tensor([2, 17, 39])
    with torch.no_grad():
        blocks = run_blocks(host.model, drafter, ids, lens, 1)
        expected = host.encode(ids).hidden[lens]
    torch.testing.assert_close(blocks.hidden[:, 0], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        ("llama", "model."),
        ("gemma3_mm", "language_model.model."),
        ("qwen3_vl", "model.language_model."),
        ("nemotron_h", "backbone."),
    ],
)
def test_names_are_found_in_the_weights(
    family: str, prefix: str, tmp_path: Path
) -> None:
    """Of text, whatever stands in front of them and beside them."""
    folder = make_tiny(family, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    starts = [f"{prefix}layers.", f"{prefix}embed"]
    assert all(any(n.startswith(start) for n in tensors) for start in starts)
    weights = TargetWeights(folder, TargetFacts.from_folder(folder))
    embedding = next(t for n, t in tensors.items() if n.startswith(starts[1]))
    torch.testing.assert_close(weights.mean_embedding(), embedding.mean(0))
    assert len(weights.layer(1)) == sum(n.startswith(f"{starts[0]}1.") for n in tensors)
