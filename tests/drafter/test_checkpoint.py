# SPDX-License-Identifier: Apache-2.0
"""Drafter folders: written whole, read strictly."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_spec.goldens import fill_weights
from tests.drafter.test_config import VALID
from tests.full_disk import no_file_above
from vllm_mtp.drafter import checkpoint
from vllm_mtp.drafter.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_drafter,
    read_config,
    save_drafter,
)
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.errors import CheckpointError, OutputError

Tensors = dict[str, torch.Tensor]
VOCAB_IDS = "draft_vocab.token_ids"
A_WEIGHT = "layers.1.q_proj.weight"
NO_WEIGHTS: dict[str, Any] = {
    "num_speculative_tokens": 1,
    "layers": [{"kind": "shared", "target_layer": 0}],
    "markov": None,
    "extra_rows": 0,
    "draft_vocab_size": None,
}


def make_drafter(**changes: Any) -> Drafter:
    """A drafter with every kind of tensor, all of them filled."""
    config = DrafterConfig.model_validate_json(
        json.dumps(VALID | {"noise": None} | changes)
    )
    drafter = Drafter(config)
    fill_weights(drafter, std=0.5)
    if drafter.draft_vocab is not None:
        drafter.draft_vocab.token_ids.copy_(torch.arange(16) * 2)
    return drafter.to(getattr(torch, config.dtype))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good drafter's folder, to be broken."""
    return save_drafter(make_drafter(), tmp_path / "drafter")


def _raw(tensors: Tensors) -> dict[str, tuple[torch.dtype, list[int], list[int]]]:
    """Type, shape and bytes: equal also where NaN or -0.0 would not tell."""
    return {
        name: (t.dtype, list(t.shape), t.flatten().view(torch.uint8).tolist())
        for name, t in tensors.items()
    }


def _weights_of(folder: Path) -> Tensors:
    """A copy: the tensors of `load_file` are the mapped file, which we overwrite."""
    return {
        name: tensor.clone()
        for name, tensor in load_file(folder / WEIGHTS_FILE).items()
    }


def _message(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_drafter(folder)
    return str(caught.value)


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_every_bit_comes_back(self, tmp_path: Path, dtype: str) -> None:
        drafter = make_drafter(dtype=dtype)
        loaded = load_drafter(save_drafter(drafter, tmp_path))
        assert loaded.config == drafter.config
        assert _raw(loaded.state_dict()) == _raw(drafter.state_dict())

    def test_saving_again_writes_the_same_bytes(
        self, folder: Path, tmp_path: Path
    ) -> None:
        again = save_drafter(load_drafter(folder), tmp_path / "again")
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            assert (again / name).read_bytes() == (folder / name).read_bytes()

    def test_a_drafter_without_options_has_no_tensors_for_them(
        self, tmp_path: Path
    ) -> None:
        drafter = make_drafter(**NO_WEIGHTS)
        loaded = load_drafter(save_drafter(drafter, tmp_path))
        assert loaded.state_dict() == {}
        assert load_file(tmp_path / WEIGHTS_FILE) == {}

    def test_folder_may_be_text_and_hold_other_files(self, folder: Path) -> None:
        (folder / "README.md").write_text("notes", "utf-8")
        assert read_config(str(folder)) == load_drafter(str(folder)).config

    def test_loaded_drafter_is_frozen_and_in_eval_mode(self, folder: Path) -> None:
        drafter = load_drafter(folder)
        assert not drafter.training
        assert not any(weight.requires_grad for weight in drafter.parameters())

    def test_conversion_leaves_token_ids_alone(self, folder: Path) -> None:
        drafter = load_drafter(folder, dtype=torch.float64)
        assert {weight.dtype for weight in drafter.parameters()} == {torch.float64}
        assert drafter.draft_vocab is not None
        assert drafter.draft_vocab.token_ids.dtype == torch.int64


class TestConfigFile:
    def test_missing(self, folder: Path) -> None:
        (folder / CONFIG_FILE).unlink()
        assert f"{folder / CONFIG_FILE}: no such file" in _message(folder)

    def test_missing_folder(self, tmp_path: Path) -> None:
        assert "no such file" in _message(tmp_path / "nowhere")

    def test_oversized_is_not_even_parsed(self, folder: Path) -> None:
        text = (folder / CONFIG_FILE).read_text("utf-8")
        limit = 1 << 20
        (folder / CONFIG_FILE).write_text(text.ljust(limit), "utf-8")
        load_drafter(folder)
        (folder / CONFIG_FILE).write_text(text.ljust(limit + 1), "utf-8")
        assert f"{limit + 1} bytes, expected at most {limit}" in _message(folder)

    @pytest.mark.parametrize("text", ["", "{", '{"model_type": }', "weights"])
    def test_not_json(self, folder: Path, text: str) -> None:
        (folder / CONFIG_FILE).write_text(text, "utf-8")
        assert "Invalid JSON" in _message(folder)

    def test_not_utf8(self, folder: Path) -> None:
        (folder / CONFIG_FILE).write_bytes(b'{"model_type": "\xff"}')
        assert "cannot be read" in _message(folder)

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda c: c.update(surprise=1), "surprise: unknown key (got 1); remove"),
            (lambda c: c.pop("dtype"), "dtype: missing; add it"),
            (lambda c: c.update(format_version=2), "format_version: got '2'"),
        ],
        ids=["unknown-key", "missing-key", "version"],
    )
    def test_not_our_keys(
        self, folder: Path, change: Callable[[dict[str, Any]], Any], expected: str
    ) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        change(config)
        (folder / CONFIG_FILE).write_text(json.dumps(config), "utf-8")
        message = _message(folder)
        assert expected in message
        # A newer format is the likely cause of all three.
        assert "reads format version 1" in message
        assert "update vllm-mtp" in message


def _break(folder: Path, change: Callable[[Tensors], Any]) -> str:
    """Change the tensors and give what loading then says."""
    tensors = _weights_of(folder)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    return _message(folder)


class TestTensors:
    def test_missing(self, folder: Path) -> None:
        message = _break(folder, lambda t: t.pop(A_WEIGHT))
        assert f"missing tensor {A_WEIGHT!r}" in message

    def test_extra(self, folder: Path) -> None:
        message = _break(folder, lambda t: t.update(lm_head=torch.zeros(2)))
        assert "unknown tensor 'lm_head'" in message

    def test_every_tensor_is_needed(self, folder: Path) -> None:
        tensors = _weights_of(folder)
        for name in tensors:
            save_file(
                {key: value for key, value in tensors.items() if key != name},
                folder / WEIGHTS_FILE,
            )
            assert f"missing tensor {name!r}" in _message(folder)

    def test_wrong_shape(self, folder: Path) -> None:
        def transpose(tensors: Tensors) -> None:
            name = "layers.1.down_proj.weight"
            tensors[name] = tensors[name].t().contiguous()

        message = _break(folder, transpose)
        assert "has shape [24, 16], expected [16, 24]" in message

    @pytest.mark.parametrize(
        ("name", "dtype", "expected"),
        [
            (A_WEIGHT, torch.float16, "has type F16, expected BF16"),
            (A_WEIGHT, torch.float32, "has type F32, expected BF16"),
            (VOCAB_IDS, torch.int32, "has type I32, expected I64"),
        ],
    )
    def test_wrong_dtype(
        self, folder: Path, name: str, dtype: torch.dtype, expected: str
    ) -> None:
        message = _break(folder, lambda t: t.update({name: t[name].to(dtype)}))
        assert f"tensor {name!r} {expected}" in message

    def test_all_problems_are_listed(self, folder: Path) -> None:
        def change(tensors: Tensors) -> None:
            tensors["odd"] = tensors.pop("markov.gate.bias")
            tensors["placeholders"] = tensors["placeholders"][:1].clone()

        message = _break(folder, change)
        for part in ("'markov.gate.bias'", "'odd'", "'placeholders' has shape [1, 16]"):
            assert part in message

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("name", ["placeholders", "layers.0.lora.q_proj.b"])
    def test_values_that_are_not_finite(
        self, folder: Path, name: str, value: float
    ) -> None:
        message = _break(folder, lambda t: t[name].view(-1)[1:2].fill_(value))
        assert "NaN or infinite values" in message
        assert f"{name!r} (1 of " in message

    def test_a_weight_that_loading_forgets_is_noticed(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Drafter, "load_state_dict", lambda *_, **__: None)
        assert "NaN or infinite values" in _message(folder)

    @pytest.mark.parametrize(
        ("index", "token", "expected"),
        [
            (3, -1, "16 different ones of 16, from -1 to 30"),
            (0, 32, "16 different ones of 16, from 2 to 32"),
            (3, 4, "15 different ones of 16, from 0 to 30"),
        ],
        ids=["negative", "beyond-vocabulary", "repeated"],
    )
    def test_draft_vocabulary(
        self, folder: Path, index: int, token: int, expected: str
    ) -> None:
        message = _break(folder, lambda t: t[VOCAB_IDS][index].fill_(token))
        assert "different token ids from 0 to 31" in message
        assert expected in message


class _Bomb:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


class TestWeightsFile:
    def test_missing(self, folder: Path) -> None:
        (folder / WEIGHTS_FILE).rename(folder / "pytorch_model.bin")
        message = _message(folder)
        assert f"{folder / WEIGHTS_FILE}: no such file" in message
        assert "no pickle" in message

    @pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
    def test_cut_off(self, folder: Path, keep: float) -> None:
        data = (folder / WEIGHTS_FILE).read_bytes()
        size = int(len(data) * keep) if keep == 0.5 else int(keep)
        (folder / WEIGHTS_FILE).write_bytes(data[:size])
        assert "not a whole safetensors file" in _message(folder)

    def test_pickle_is_not_run(self, folder: Path, tmp_path: Path) -> None:
        trace = tmp_path / "was-run"
        (folder / WEIGHTS_FILE).write_bytes(pickle.dumps(_Bomb(trace)))
        assert "not a whole safetensors file" in _message(folder)
        assert not trace.exists()
        pickle.loads((folder / WEIGHTS_FILE).read_bytes())
        assert trace.exists()  # the file would have done it

    def test_torch_file(self, folder: Path) -> None:
        torch.save(_weights_of(folder), folder / WEIGHTS_FILE)
        assert "not a whole safetensors file" in _message(folder)


class TestWriting:
    def _fail(self, *_: Any, **__: Any) -> NoReturn:
        raise OSError("disk full")

    def test_a_failure_leaves_the_old_drafter_whole(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = {path.name: path.read_bytes() for path in folder.iterdir()}

        def half(tensors: Tensors, path: Path, **_: Any) -> NoReturn:
            Path(path).write_bytes(b"half")
            self._fail()

        monkeypatch.setattr(checkpoint, "save_file", half)
        with pytest.raises(OutputError, match="cannot be written .disk full"):
            save_drafter(make_drafter(num_speculative_tokens=2), folder)
        # No trace of the attempt either.
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def test_a_new_folder_has_no_config_before_its_weights(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moved: list[str] = []
        replace = os.replace

        def move(source: Path, place: Path) -> None:
            moved.append(place.name)
            if place.name == CONFIG_FILE:
                self._fail()
            replace(source, place)

        monkeypatch.setattr(checkpoint.os, "replace", move)
        with pytest.raises(OutputError, match="cannot be written .disk full"):
            save_drafter(make_drafter(), tmp_path)
        assert moved == [WEIGHTS_FILE, CONFIG_FILE]
        assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_FILE]

    @pytest.mark.parametrize("made", [{}, NO_WEIGHTS], ids=["weights", "no weights"])
    def test_a_full_disk_leaves_no_half_drafter(
        self, tmp_path: Path, made: dict[str, Any]
    ) -> None:
        """Wherever in its files the room ends."""
        drafter = make_drafter(**made)
        whole = save_drafter(drafter, tmp_path / "whole")
        needed = max(path.stat().st_size for path in whole.iterdir())
        for room in [0, 1, 7, 8, 15, 16, *range(17, needed, 97), needed - 1]:
            folder = tmp_path / f"{room}"
            with no_file_above(room), pytest.raises(OutputError) as caught:
                save_drafter(drafter, folder)
            assert f"{folder}: cannot be written" in str(caught.value)
            assert not list(folder.iterdir())
            with pytest.raises(CheckpointError):
                load_drafter(folder)
        with no_file_above(needed):
            load_drafter(save_drafter(drafter, tmp_path / "fits"))

    def test_a_full_disk_leaves_the_old_drafter(self, folder: Path) -> None:
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        for room in (0, 100, 5000):
            with no_file_above(room), pytest.raises(OutputError):
                save_drafter(make_drafter(num_speculative_tokens=2), folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def test_a_place_that_is_no_folder_is_named(self, folder: Path) -> None:
        for place in (folder / CONFIG_FILE, folder / CONFIG_FILE / "in-it"):
            with pytest.raises(OutputError, match=f"^{place}: cannot be written"):
                save_drafter(make_drafter(), place)

    def test_nothing_else_is_left_in_the_folder(self, folder: Path) -> None:
        assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}

    def test_writing_over_a_drafter_replaces_it(self, folder: Path) -> None:
        other = make_drafter(num_speculative_tokens=2)
        save_drafter(other, folder)
        assert load_drafter(folder).config == other.config
