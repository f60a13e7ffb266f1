# SPDX-License-Identifier: Apache-2.0
"""Facts of targets: read, compared, refused; and the weights' fingerprint."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    Gemma4TextConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    Qwen3Config,
)

from tests.tiny_targets import make_tiny_llama
from vllm_mtp.drafter.target_facts import (
    TargetFacts,
    fingerprint_of_shapes,
    layers_with_attention,
    layers_without_values,
    sliding_windows,
    weights_fingerprint,
)
from vllm_mtp.errors import TargetMismatchError, UnsupportedTargetError

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FACTS = TargetFacts(
    name="tiny",
    model_type="llama",
    num_hidden_layers=4,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=512,
    rope_parameters=DEFAULT_ROPE,
    weights_fingerprint="00ff",
)


class PlainConfig(SimpleNamespace):
    """A config that lacks whatever it is not given."""

    def get_text_config(self) -> "PlainConfig":
        return self


def _plain(**changes: Any) -> PlainConfig:
    fields = {
        "model_type": "odd",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
    return PlainConfig(**fields | changes)


def _llama(**changes: Any) -> LlamaConfig:
    sizes = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
    }
    return LlamaConfig(**sizes | changes)


def test_facts_of_a_tiny_llama() -> None:
    found = TargetFacts.from_hf_config(_llama(), name="tiny")
    assert found == FACTS.model_copy(update={"weights_fingerprint": None})


def test_facts_of_a_folder(tiny_qwen3: Path) -> None:
    facts = TargetFacts.from_folder(tiny_qwen3)
    assert facts.model_type == "qwen3"
    assert facts.name == tiny_qwen3.name
    assert facts.weights_fingerprint == weights_fingerprint(tiny_qwen3)


def test_facts_of_a_multimodal_model_are_its_text_part() -> None:
    outer = LlavaConfig(text_config=_llama())
    assert TargetFacts.from_hf_config(outer, name="tiny").differences(FACTS) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sliding_window": 64}, [64, 64]),
        ({"sliding_window": None}, [None, None]),
        ({"sliding_window": 512}, [None, None]),  # no text is as long
        (
            {
                "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            [64, None],
        ),
        ({}, [None, None]),
    ],
)
def test_sliding_windows(changes: dict[str, Any], expected: list[int | None]) -> None:
    config = SimpleNamespace(
        num_hidden_layers=2, max_position_embeddings=512, **changes
    )
    assert sliding_windows(config) == expected


def test_facts_survive_json() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    facts = TargetFacts.from_hf_config(_llama(rope_parameters=rope))
    again = TargetFacts.model_validate_json(facts.model_dump_json())
    assert again == facts
    assert again.rope_parameters["factor"] == 4.0


def test_heads_have_defaults_as_in_old_configs() -> None:
    facts = TargetFacts.from_hf_config(_plain())
    assert (facts.num_key_value_heads, facts.head_dim) == (4, 16)
    assert facts.intermediate_size is None


def test_stated_head_dim_wins_over_the_quotient() -> None:
    assert TargetFacts.from_hf_config(Qwen3Config(head_dim=48)).head_dim == 48


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 10000.0}, DEFAULT_ROPE),
        ({"rope_theta": 10000.0, "rope_scaling": None}, DEFAULT_ROPE),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        ),
    ],
)
def test_rope_of_old_configs_reads_like_that_of_new_ones(
    old: dict[str, Any], new: dict[str, Any]
) -> None:
    before = TargetFacts.from_hf_config(_plain(**old))
    after = TargetFacts.from_hf_config(_plain(rope_parameters=new))
    assert before.rope_parameters == after.rope_parameters == new


def test_rope_tuples_read_like_lists() -> None:
    # JSON knows lists only: a config in memory must equal its written self.
    facts = TargetFacts.from_hf_config(_plain(rope_parameters={"factors": (1, 2)}))
    assert facts.rope_parameters == {"factors": [1, 2]}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (DeepseekV3Config(), r"latent attention \(kv_lora_rank=512\)"),
        (MambaConfig(), "no num_attention_heads|no attention layer"),
        (_plain(num_attention_heads=None), "no num_attention_heads"),
        (_plain(layer_types=["linear_attention", "conv"]), "no attention layer"),
    ],
    ids=["mla", "mamba", "no-heads", "linear-attention"],
)
def test_targets_without_keys_per_head_are_refused(config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedTargetError, match=reason) as caught:
        TargetFacts.from_hf_config(config)
    assert repr(config.model_type) in str(caught.value)
    assert "Use a target with" in str(caught.value)


def _gemma4() -> Gemma4TextConfig:
    """Its head size and KV heads differ from layer to layer."""
    return Gemma4TextConfig(
        num_hidden_layers=6,
        head_dim=32,
        global_head_dim=64,
        hidden_size_per_layer_input=0,
    )


class _Broken(PlainConfig):
    @property
    def num_attention_heads(self) -> int:
        raise RuntimeError("a fault\nof the model's own code")


def _broken() -> _Broken:
    return _Broken(model_type="broken")


def test_what_a_config_raises_is_one_line() -> None:
    reason = r"'broken': .*RuntimeError: a fault of the model's own code\)\. Use"
    with pytest.raises(UnsupportedTargetError, match=reason) as caught:
        TargetFacts.from_hf_config(_broken())
    assert "\n" not in str(caught.value)


def test_heads_that_differ_from_layer_to_layer() -> None:
    facts = TargetFacts.from_hf_config(_gemma4())
    sizes = [facts.of_layer(index).head_dim for index in range(6)]
    assert sizes == [32, 32, 32, 32, 32, 64]
    assert facts.of_layer(5).layer_heads is None
    assert facts.of_layer(0) == facts.of_layer(1) != facts.of_layer(5)
    again = TargetFacts.model_validate_json(facts.model_dump_json())
    assert again == facts
    with pytest.raises(ValueError, match="one for each of the 5 layers"):
        TargetFacts(**facts.model_dump() | {"num_hidden_layers": 5})
    numbers = [2, 2, 2, 2, 1, 2]
    odd = _plain(num_hidden_layers=6, num_attention_heads_per_layer=numbers)
    facts = TargetFacts.from_hf_config(odd)
    assert [facts.of_layer(i).num_attention_heads for i in range(6)] == numbers


def test_windows_that_a_config_does_not_tell() -> None:
    with pytest.raises(UnsupportedTargetError, match="'odd'.*num_hidden_layers"):
        sliding_windows(PlainConfig(model_type="odd"))


def test_layers_with_attention() -> None:
    kinds = ["linear_attention", "full_attention", "conv", "sliding_attention"]
    assert layers_with_attention(_plain(layer_types=kinds)) == [1, 3]
    assert layers_with_attention(_plain()) == [0, 1]


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_hybrids_with_attention_layers_are_read(kind: str) -> None:
    config = _plain(layer_types=["linear_attention", kind])
    assert TargetFacts.from_hf_config(config).model_type == "odd"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mistral"),
        ("num_hidden_layers", 5),
        ("hidden_size", 128),
        ("intermediate_size", None),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 16),
        ("vocab_size", 513),
        ("rope_parameters", DEFAULT_ROPE | {"rope_theta": 1e6}),
    ],
)
def test_every_fact_counts(key: str, value: Any) -> None:
    other = FACTS.model_copy(update={key: value})
    expected = (
        f"target.{key}: the drafter was made for {getattr(FACTS, key)!r}, "
        f"this target has {value!r}"
    )
    assert FACTS.differences(other) == [expected]
    with pytest.raises(TargetMismatchError) as caught:
        FACTS.require_same(other)
    assert expected in str(caught.value)
    assert "(tiny)" in str(caught.value)  # which target would be right


def test_all_differences_are_listed() -> None:
    other = FACTS.model_copy(update={"head_dim": 16, "vocab_size": 513})
    with pytest.raises(TargetMismatchError, match=r"head_dim[^$]*vocab_size"):
        FACTS.require_same(other)


def test_name_and_weights_do_not_tell_targets_apart() -> None:
    other = FACTS.model_copy(update={"name": "copy", "weights_fingerprint": None})
    FACTS.require_same(other)


def _save(folder: Path, **shapes: tuple[int, ...]) -> Path:
    """One file per tensor; the names of the files play no part."""
    folder.mkdir()
    for number, (name, shape) in enumerate(shapes.items()):
        tensor = torch.full(shape, float(number))
        save_file({name: tensor}, folder / f"part-{number}.safetensors")
    return folder


def test_fingerprint_is_of_names_and_shapes(tmp_path: Path) -> None:
    first = weights_fingerprint(_save(tmp_path / "1", a=(2, 3), b=(4,)))
    other_files_and_values = _save(tmp_path / "2", b=(4,), a=(2, 3))
    assert weights_fingerprint(other_files_and_values) == first
    for number, shapes in enumerate(
        ({"a": (3, 2), "b": (4,)}, {"a": (2, 3), "c": (4,)}, {"a": (2, 3)})
    ):
        odd = _save(tmp_path / f"odd-{number}", **shapes)
        assert weights_fingerprint(odd) != first


def test_fingerprint_is_the_documented_hash() -> None:
    # sha256 of "a [2, 3]\nb [4]": the format promises it to drafters out there.
    assert fingerprint_of_shapes({"b": (4,), "a": torch.Size([2, 3])}) == (
        "eb924e2d8fbd658158a29c7dc820e078dbe2ce2a5b39e5d77bea5f9f9395dd55"
    )


@given(
    st.dictionaries(st.text("abc.", min_size=1), st.lists(st.integers(1, 9))),
    st.randoms(),
)
def test_fingerprint_does_not_depend_on_order(
    shapes: dict[str, list[int]], random: Any
) -> None:
    items = list(shapes.items())
    random.shuffle(items)
    assert fingerprint_of_shapes(dict(items)) == fingerprint_of_shapes(shapes)


def test_no_weights_no_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"no safetensors")
    assert weights_fingerprint(tmp_path) is None


def test_fingerprint_of_a_target_in_one_file_and_in_shards(
    tiny_llama: Path, tmp_path: Path
) -> None:
    weights = load_file(tiny_llama / "model.safetensors")
    names = sorted(weights)
    for part in (0, 1):
        shard = {name: weights[name] for name in names[part::2]}
        save_file(shard, tmp_path / f"model-0000{part}-of-00002.safetensors")
    assert weights_fingerprint(tmp_path) == weights_fingerprint(tiny_llama)


def test_tiny_targets_of_other_shapes_differ(tiny_llama: Path, tmp_path: Path) -> None:
    small = make_tiny_llama(tmp_path / "small", num_hidden_layers=2)
    assert weights_fingerprint(small) != weights_fingerprint(tiny_llama)


def test_layers_whose_values_are_their_keys() -> None:
    config = _gemma4()
    kinds = config.layer_types
    full = {i for i, kind in enumerate(kinds) if kind == "full_attention"}
    config.attention_k_eq_v = True
    assert layers_without_values(config) == full
    config.attention_k_eq_v = False
    assert layers_without_values(config) == frozenset()
    assert layers_without_values(LlamaConfig()) == frozenset()
