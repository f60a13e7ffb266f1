# SPDX-License-Identifier: Apache-2.0
"""Noise tokens as placeholders: drawn for each block, not trained, told at the end."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec.goldens import fill_weights
from tests.tiny_answers import MakeArguments
from tests.tiny_targets import VOCAB_SIZE
from vllm_mtp.cli.main import main
from vllm_mtp.drafter.checkpoint import load_drafter
from vllm_mtp.drafter.config import NoiseConfig
from vllm_mtp.errors import MTPError
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.torch_host.texts import forward_texts
from vllm_mtp.training.growth import warm_start
from vllm_mtp.training.loss_module import LossModule, LossPlan
from vllm_mtp.training.run import train
from vllm_mtp.training.states import TrainingInputError

TEXT: dict[str, Any] = {
    "index": 0,
    "input_ids": torch.arange(30) * 37 % VOCAB_SIZE,
    "loss_spans": [[4, 30]],
}
NOISE: dict[str, Any] = {"placeholder_kind": "noise", "mask_token_id": 400}
LORA: dict[str, Any] = {"lora_rank": 4, "lora_modules": ["q_proj", "v_proj", "up_proj"]}


@pytest.fixture(scope="module")
def host(tiny_llama: Path) -> HFTarget:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    return HFTarget(model.eval().requires_grad_(False))


def loss_module(host: HFTarget, target: Path, layers: str, **more: Any) -> LossModule:
    options = DrafterOptions(dtype="float32", **NOISE | LORA | more)
    drafter = new_drafter(target, layers, 3, options)
    fill_weights(torch.nn.ModuleList(drafter.layers), 0.1, salt="noise ")
    return LossModule(drafter, host, LossPlan(anchors_per_text=6))


@pytest.mark.parametrize("layers", ["shared:all", "shared:0,own:3"])
def test_every_block_of_every_step_reads_its_own_tokens(
    layers: str, host: HFTarget, tiny_llama: Path
) -> None:
    """What a block drafts is what a drafter with these very placeholders drafts."""
    module = loss_module(host, tiny_llama, layers)
    blocks = [module.blocks(TEXT, step) for step in (0, 1)]
    drawn = [part.noise_ids for part in blocks]
    assert all(ids is not None and ids.shape == (6, 2) for ids in drawn)
    rows = torch.cat([ids for ids in drawn if ids is not None])
    assert len(rows.unique(dim=0)) == 12
    assert 1 <= int(rows.min()) <= int(rows.max()) < 400
    with torch.no_grad():
        hidden = forward_texts(module.bound, blocks, 3)
        placeholders = module.drafter.placeholders
        assert placeholders is not None
        number = 0
        for part in blocks:
            for block in range(6):
                assert part.noise_ids is not None
                placeholders.copy_(host.embed(part.noise_ids[block]))
                alone = part._replace(
                    prefix_lens=part.prefix_lens[block : block + 1], noise_ids=None
                )
                expected = forward_texts(module.bound, [alone], 3)[0]
                torch.testing.assert_close(
                    hidden[number], expected, atol=1e-4, rtol=1e-4
                )
                number += 1


def test_the_loss_is_that_of_the_drawn_tokens(host: HFTarget, tiny_llama: Path) -> None:
    """The same step gives the same loss, and only a block's own tokens decide it."""
    module = loss_module(host, tiny_llama, "shared:all")
    blocks = module.blocks(TEXT, 3)
    loss = module([TEXT], 3)["loss"]
    assert loss.equal(module([TEXT], 3)["loss"])
    assert loss.equal(module.loss_of([blocks])["loss"])
    assert not loss.isclose(module.loss_of([blocks._replace(noise_ids=None)])["loss"])
    loss.backward()
    placeholders = module.drafter.placeholders
    assert placeholders is not None
    assert placeholders.grad is None
    assert not placeholders.requires_grad


def test_anchors_stand_where_they_stand_without_noise(
    host: HFTarget, tiny_llama: Path
) -> None:
    noisy = loss_module(host, tiny_llama, "shared:all").blocks(TEXT, 7)
    trained = {"placeholder_kind": "trained", "mask_token_id": None}
    plain = loss_module(host, tiny_llama, "shared:all", **trained).blocks(TEXT, 7)
    assert plain.noise_ids is None
    assert noisy.prefix_lens.equal(plain.prefix_lens)


def test_a_run_is_exported_and_comes_back(
    arguments: MakeArguments, tiny_llama: Path, tmp_path: Path
) -> None:
    """Resumed after half of its steps, it is the run that nobody broke."""
    settings = {**NOISE, **LORA, "layers": "shared:all", "learning_rate": 3e-3}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    train(arguments(**settings, output_dir=str(tmp_path / "whole")), tiny_llama)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "broken" / "checkpoint-4")
    again = arguments(**settings, output_dir=str(tmp_path / "broken"))
    again.resume_from_checkpoint = "last"
    train(again, tiny_llama)
    whole, broken = (load_drafter(tmp_path / name) for name in ("whole", "broken"))
    for name, tensor in whole.state_dict().items():
        assert tensor.equal(broken.state_dict()[name]), name
    noise = whole.config.noise
    assert isinstance(noise, NoiseConfig)
    assert (noise.low, noise.high) == (1, 400)
    table = load_file(tiny_llama / "model.safetensors")["model.embed_tokens.weight"]
    assert whole.placeholders is not None
    assert whole.placeholders.equal(table[list(noise.token_ids)])

    target = ["--target", str(tiny_llama)]
    adapter, back = str(tmp_path / "adapter"), tmp_path / "back"
    assert main(["export", str(tmp_path / "whole"), *target, "--out", adapter]) == 0
    assert main(["import", adapter, *target, "--out", str(back)]) == 0
    returned = load_drafter(back)
    assert returned.config == whole.config
    for name, tensor in whole.state_dict().items():
        assert tensor.equal(returned.state_dict()[name]), name


def test_growing_keeps_the_drafters_own_noise(tiny_llama: Path) -> None:
    first, more = (
        new_drafter(
            tiny_llama, "shared:all", k, DrafterOptions(dtype="float32", **NOISE | LORA)
        )
        for k in (3, 5)
    )
    fill_weights(torch.nn.ModuleList(first.layers), 0.2)
    assert more.placeholders is not None
    before = more.placeholders.clone()
    assert warm_start(more, first) == []
    assert more.placeholders.equal(before)
    pair = "layers.2.lora.v_proj.b"
    assert more.state_dict()[pair].equal(first.state_dict()[pair])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"train_only": "new_positions", "warm_start": "x", "lora_rank": 2},
            "train_only: new_positions trains placeholders, and those of",
        ),
        ({"mask_token_id": -2}, "mask_token_id: got -2, expected 1 to"),
        ({"noise_low": 400}, "noise_low: got 400, expected 0 to 399"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    settings: dict[str, Any], expected: str, arguments: MakeArguments
) -> None:
    with pytest.raises(MTPError, match=expected):
        arguments(**NOISE | settings)


def test_noise_without_lora_is_nothing_to_train(
    arguments: MakeArguments, tiny_llama: Path
) -> None:
    with pytest.raises(TrainingInputError, match="nothing to train"):
        train(arguments(**NOISE), tiny_llama)


def test_a_token_that_the_target_does_not_have_is_refused(
    arguments: MakeArguments, tiny_llama: Path
) -> None:
    args = arguments(**NOISE | LORA | {"mask_token_id": VOCAB_SIZE + 1})
    with pytest.raises(MTPError, match="mask_token_id: got 513, expected 1 to 512"):
        train(args, tiny_llama)
