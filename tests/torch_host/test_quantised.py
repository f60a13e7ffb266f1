# SPDX-License-Identifier: Apache-2.0
"""Targets with weights of eight bits: read as what they stand for, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_answers import MakeArguments, write_answers
from tests.tiny_targets import make_tiny_llama, make_tiny_w8a8
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.torch_host.dequantise import dequantised
from vllm_mtp.torch_host.load import load_frozen
from vllm_mtp.torch_host.new_drafter import new_drafter
from vllm_mtp.training.run import train

BLOCK = 32


def make_tiny_fp8(folder: Path) -> Path:
    """A tiny Llama in float8 with a scale per block, as Qwen's and DeepSeek's are."""
    make_tiny_llama(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj." in name]:
        weight = tensors[name]
        blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        scale = blocks.abs().amax((1, 3)) / 448
        spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        tensors[name] = (weight / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(
        folder,
        quantization_config={
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        },
    )
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def by_hand(folder: Path, layer: int) -> dict[str, torch.Tensor]:
    """What the layer's projections stand for."""
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name, tensor in tensors.items():
        if f"layers.{layer}." not in name or not name.endswith("_proj.weight"):
            continue
        if (scale := tensors.get(f"{name}_scale_inv")) is not None:
            scale = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        else:
            scale = tensors[f"{name}_scale"]
        found[name.split(".")[-2]] = tensor.float() * scale
    assert len(found) == 7
    return found


@pytest.mark.parametrize("make", [make_tiny_w8a8, make_tiny_fp8])
def test_eight_bits_with_scales(
    make: Callable[[Path], Path], arguments: MakeArguments, tmp_path: Path
) -> None:
    target = make(tmp_path / "target")
    expected = by_hand(target, 3)
    drafter = new_drafter(target, "own:3", 2)
    model = load_frozen(target, "float32", "cpu")
    model(torch.arange(3)[None])  # compressed-tensors unpacks when first used
    loaded = model.model.layers[3]
    for name, weight in expected.items():
        part = loaded.self_attn if hasattr(loaded.self_attn, name) else loaded.mlp
        assert torch.equal(getattr(part, name).weight, weight), name
        copied = drafter.layers[0].get_parameter(f"{name}.weight")
        assert torch.equal(copied, weight.to(copied.dtype)), name
    texts = [[(7 * i + n) % 500 for i in range(16)] for n in range(12)]
    data = write_answers(tmp_path / "data", target, texts, [4] * 12)
    args = arguments(target=str(target), data=str(data), layers="own:3", max_steps=1)
    assert train(args, target)["eval_teacher_forced_length"] >= 1.0


def test_weights_that_would_be_random_are_refused(tmp_path: Path) -> None:
    """transformers fills in what it does not find."""
    plain = make_tiny_llama(tmp_path / "plain")
    tensors = load_file(plain / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    refused = r"1 of its tensors are missing, such as .*layers\.2\.mlp\.up_proj"
    with pytest.raises(UnsupportedTargetError, match=refused):
        load_frozen(plain, "float32", "cpu")
    packed = make_tiny_w8a8(tmp_path / "w8a8")
    edit_config(packed, quantization_config={"quant_method": "no-such-method"})
    tensors = load_file(packed / "model.safetensors")
    renamed = {n.replace("_proj.weight", "_proj.packed"): t for n, t in tensors.items()}
    save_file(renamed, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedTargetError, match="28 of its tensors are missing"):
        load_frozen(packed, "float32", "cpu")


WEIGHT = torch.arange(-6, 6, dtype=torch.int8).view(3, 4)


@pytest.mark.parametrize(
    "scale",
    [torch.tensor(0.5), torch.tensor([0.5]), torch.full((3,), 0.5)]
    + [torch.full((3, 1), 0.5), torch.full((2, 2), 0.5)],
    ids=lambda scale: str(list(scale.shape)),
)
def test_scales_of_a_tensor_a_row_or_a_block(scale: torch.Tensor) -> None:
    tensors = {"a.weight": WEIGHT, "a.weight_scale": scale, "b.weight": torch.ones(2)}
    tensors |= {"a.weight_zero_point": torch.zeros(3, 1), "a.input_scale": scale}
    found = dequantised(tensors, block=(2, 2))
    assert found.keys() == {"a.weight", "b.weight"}
    assert torch.equal(found["a.weight"], WEIGHT * 0.5)
    assert found["b.weight"] is tensors["b.weight"]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"weight_scale": torch.ones(4)},
        {"weight_scale_inv": torch.ones(5, 5)},
        {"weight_scale": torch.ones(3, 1), "weight_zero_point": torch.ones(3, 1)},
    ],
    ids=lambda more: "-".join(more) or "none",
)
def test_scales_that_do_not_fit_are_refused(more: dict[str, torch.Tensor]) -> None:
    tensors = {"a.weight": WEIGHT} | {f"a.{name}": t for name, t in more.items()}
    with pytest.raises(UnsupportedTargetError, match=r"a\.weight is torch.int8"):
        dequantised(tensors)
