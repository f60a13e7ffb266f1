# SPDX-License-Identifier: Apache-2.0
"""Trains one step on a target that is on one device, and on one that is divided.

python -m tests.torch_host.divided TARGET=LAYERS ...
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from torch import nn

from checkpoints_spec.goldens import fill_weights
from tests.tiny_targets import VOCAB_SIZE
from tests.torch_host.fake_devices import fake_devices
from vllm_mtp.drafter.layers import OwnLayer
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import load_frozen
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.training.bridges import bridged_layers, fit_bridges
from vllm_mtp.training.loss_module import LossModule, LossPlan
from vllm_mtp.training.loss_vocabulary import LossVocabulary
from vllm_mtp.training.objective import Objective

TOKENS = torch.arange(30) * 37 % VOCAB_SIZE
HOME = torch.device("fake", 0)
# Back and forth, and the head elsewhere than the drafter.
PLACES = {
    "embed_tokens": 1,
    "rotary_emb": 1,
    "layers.0": 1,
    "layers.1": 0,
    "layers.2": 2,
    "layers.3": 1,
    "norm": 2,
}


def step(drafter: Drafter, host: HFTarget) -> dict[str, torch.Tensor]:
    """States, losses and gradients, on the CPU."""
    own = any(isinstance(layer, OwnLayer) for layer in drafter.layers)
    plan = LossPlan(
        Objective(ce=0.5, kl=0.5, tv=0.5, teacher_tokens=8), 6, 0.5 if own else 0.0
    )
    candidates = LossVocabulary(torch.arange(64).to(host.device), VOCAB_SIZE)
    loss_module = LossModule(drafter, host, plan, candidates)
    text: dict[str, Any] = {
        "index": 0,
        "input_ids": TOKENS.to(host.device),
        "loss_spans": [[4, 30]],
    }
    if bridged_layers(drafter):
        fit_bridges(loss_module.bound, [text])
    losses = loss_module([text], step=0)
    losses["loss"].backward()
    gradients = {
        f"gradient of {name}": weight.grad
        for name, weight in drafter.named_parameters()
        if weight.grad is not None
    }
    states = host.encode(text["input_ids"])
    seen = {"hidden": states.hidden, **losses, **gradients}
    seen |= {f"keys {i}": keys for i, keys in states.keys.items()}
    return {name: tensor.detach().cpu() for name, tensor in seen.items()}


def divided(model: Any) -> HFTarget:
    places = {f"model.{name}": f"fake:{at}" for name, at in PLACES.items()}
    tied = model.config.tie_word_embeddings
    with_head = places["model.embed_tokens" if tied else "model.norm"]
    # The fast one counts tokens by an operation that a CPU does not have.
    model.config._experts_implementation = "eager"
    model = dispatch_model(
        model,
        places | {"lm_head": with_head},
        main_device=HOME,
        skip_keys=model._skip_keys_device_placement,
    )
    return HFTarget(model, HOME)


def compare(target: str, layers: str) -> None:
    options = DrafterOptions(
        dtype="float32",
        lora_rank=2 if "shared" in layers else None,
        lora_modules=["q_proj", "v_proj", "o_proj"],
        markov_rank=4,
        boundary_hidden="all" if "own" in layers else "none",
        bridges="own" in layers,
        own_init="random" if "gpt_oss" in target else "copy",
    )
    drafter = new_drafter(target, layers, 3, options).float()
    fill_weights(drafter, 0.1, salt="divided ")
    elsewhere: nn.Module = copy.deepcopy(drafter)
    expected = step(drafter, HFTarget(load_frozen(target, "float32", "cpu")))
    model = load_frozen(target, "float32", "cpu")
    with fake_devices():
        host = divided(model)
        assert {str(p.device) for p in model.parameters()} == {
            "fake:0",
            "fake:1",
            "fake:2",
        }
        found = step(elsewhere.to(HOME), host)  # type: ignore[arg-type]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # The CPU has an attention kernel of its own, fake devices take another.
        torch.testing.assert_close(
            found[name],
            tensor,
            rtol=1e-3,
            atol=2e-4,
            msg=lambda said, name=name: f"{name}: {said}",
        )
        assert tensor.abs().sum() > 0, name
    print(f"{Path(target).name} {layers}: {len(found)} tensors are the same")


if __name__ == "__main__":
    for case in sys.argv[1:]:
        compare(*case.split("="))
