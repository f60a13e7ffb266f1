# SPDX-License-Identifier: Apache-2.0
"""PEFT folders: every field is decided, and what a drafter cannot be is refused."""

import json
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests.peft_rows import save_adapter
from vllm_mtp.drafter.noise import draw_noise_config
from vllm_mtp.sharing.peft_folder import (
    CONFIG_FILE,
    HONOURED,
    NOISE_FILE,
    REFUSED,
    SILENT,
    WEIGHTS_FILE,
    AdapterError,
    read_adapter,
    write_adapter,
)

FIELDS: dict[str, "Field[Any]"] = {field.name: field for field in fields(LoraConfig)}
# Of our own reading of peft's source: what else a field may say than its default.
OTHER: dict[str, Any] = {
    "bias": "all",
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [3],
    "alora_invocation_tokens": [3],
    "modules_to_save": ["lm_head"],
    "target_parameters": ["w"],
}


@pytest.fixture(scope="module")
def saved(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(tiny_llama, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A good adapter's folder, to be broken."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def change_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text("utf-8")) | values
    path.write_text(json.dumps(config), "utf-8")


def message(folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


def test_every_field_is_decided() -> None:
    """A new version of peft has a new one? Put it into one of the tables."""
    undecided = set(FIELDS) - HONOURED - SILENT - set(REFUSED)
    assert not undecided
    assert not (HONOURED & SILENT) | ((HONOURED | SILENT) & set(REFUSED))


def test_what_peft_writes_by_default_is_taken(folder: Path) -> None:
    """Each default of a refused field says nothing."""
    for name in set(REFUSED) & set(FIELDS):
        field = FIELDS[name]
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        change_config(folder, **{name: default})
    adapter = read_adapter(folder)
    assert (adapter.config.r, adapter.config.lora_alpha) == (4, 12)
    assert len(adapter.pairs) == 4 * 7
    assert adapter.noise is None


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_a_drafter_cannot_be_is_refused_by_name(name: str, folder: Path) -> None:
    default = FIELDS[name].default
    value = OTHER.get(name, True if isinstance(default, bool) else {"a": 1})
    change_config(folder, **{name: value})
    text = message(folder)
    assert f"{name}: got {value}" in text
    assert REFUSED[name] in text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"peft_type": "LOHA"}, "peft_type: got 'LOHA', expected 'LORA'"),
        ({"wings": 2}, "wings: got 2, expected nothing: this version of vllm-mtp"),
        ({"r": 0}, "r: got 0, expected a number greater than or equal to 1"),
        ({"r": "4"}, "r: got '4', expected a valid integer"),
        ({"lora_alpha": 0}, "lora_alpha: got 0, expected a number greater than 0"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": "(q_proj"}, "target_modules: '(q_proj' is no regular"),
        ({"rank_pattern": {"(q": 4}}, "rank_pattern: '(q' is no regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: got 0 for 'q_proj'"),
        ({"layers_pattern": ["(a"]}, "layers_pattern: '(a' is no regular expression"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa', which"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: got 'olora', which"),
    ],
    ids=str,
)
def test_wrong_values_are_named(
    values: dict[str, Any], expected: str, folder: Path
) -> None:
    change_config(folder, **values)
    assert expected in message(folder)


def test_missing_fields_are_named(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text('{"peft_type": "LORA", "r": 4}', "utf-8")
    assert "lora_alpha: missing" in message(folder)


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_config_is_a_json_object(text: str, folder: Path) -> None:
    (folder / CONFIG_FILE).write_text(text, "utf-8")
    message(folder)


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name.replace("lora_A", "lora_magnitude_vector")] = tensors.pop(name)


def _lose(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(next(iter(tensors)))


def _spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(iter(tensors))][0, 0] = torch.nan


def _mix(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name].double()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_rename, "got base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_"),
        (_lose, "model.layers.0.mlp.down_proj (half of it)"),
        (_spoil, "down_proj.lora_A.weight holds values that are not finite"),
        (_mix, "its tensors are float32, float64, expected all of one type"),
        (dict.clear, "got no tensor"),
    ],
)
def test_wrong_tensors_are_named(
    damage: Callable[[dict[str, torch.Tensor]], None], expected: str, folder: Path
) -> None:
    tensors = dict(sorted(load_file(folder / WEIGHTS_FILE).items()))
    damage(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    assert expected in message(folder)


def test_pickled_and_broken_weights_are_not_opened(folder: Path) -> None:
    weights = folder / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "not a whole safetensors file" in message(folder)
    weights.rename(folder / "adapter_model.bin")
    assert "no pickle" in message(folder)


def test_a_folder_one_level_down_is_pointed_at(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (folder / CONFIG_FILE).rename(tmp_path / "adapter" / CONFIG_FILE)
    assert "it stands in adapter: --subfolder names that" in message(folder)


def test_writing_and_reading_gives_the_same(folder: Path, tmp_path: Path) -> None:
    adapter = read_adapter(folder)
    noise = draw_noise_config(1, 512, 3, seed=5)
    again = tmp_path / "again"
    write_adapter(
        again, json.loads((folder / CONFIG_FILE).read_text()), adapter.pairs, noise
    )
    back = read_adapter(again)
    assert back.config == adapter.config
    assert back.noise == noise
    assert back.pairs.keys() == adapter.pairs.keys()
    for name, pair in back.pairs.items():
        assert pair.a.equal(adapter.pairs[name].a)
        assert pair.b.equal(adapter.pairs[name].b)


def test_broken_noise_is_named(folder: Path) -> None:
    (folder / NOISE_FILE).write_text('{"low": 5, "high": 5, "token_ids": [5]}')
    assert "noise.low: got 5, expected less than high (5)" in message(folder)
