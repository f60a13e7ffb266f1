# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters on the target beside drafts, on both runners."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from vllm import LLM
from vllm.lora.layers import FusedMoEWithLoRA
from vllm.lora.request import LoRARequest

from tests.serving.engines import ON_V2, engine, generate
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.serving.adapters import without_adapters

pytestmark = pytest.mark.engine

HIDDEN, RANK = 64, 4
PROMPTS = [[(7 * i + j) % 512 for i in range(20 + 9 * j)] for j in range(4)]
LENGTH = 8 if ON_V2 else 40
# vLLM's CPU kernels give requests without an adapter the last slot's: it stays empty.
SETTINGS: dict[str, Any] = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}

Drafter = Callable[[str, str], Path]


def save_adapter(target: Path, folder: Path, modules: Sequence[str], seed: int) -> None:
    """As peft writes one, on these modules of every layer, strong enough to be seen."""
    config = json.loads((target / "config.json").read_text("utf-8"))
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    keys, inner = config["num_key_value_heads"] * head_dim, config["intermediate_size"]
    queries = config["num_attention_heads"] * head_dim
    sizes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
        "embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (hidden, config["vocab_size"]),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        width_in, width_out = sizes[module]
        if module == "embed_tokens":
            places, names = ["model.embed_tokens"], ("embedding_A", "embedding_B")
        elif module == "lm_head":
            places, names = ["lm_head"], ("A.weight", "B.weight")
        else:
            part = "mlp" if module.startswith(("gate", "up", "down")) else "self_attn"
            layers = range(config["num_hidden_layers"])
            places = [f"model.layers.{index}.{part}.{module}" for index in layers]
            names = ("A.weight", "B.weight")
        for place in places:
            for name, shape in zip(
                names, ((RANK, width_in), (width_out, RANK)), strict=True
            ):
                tensor = torch.randn(shape, generator=generator) * 0.3
                tensors[f"base_model.model.{place}.lora_{name}"] = tensor
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": list(modules),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings), "utf-8")


EVERYWHERE = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("embed_tokens", "lm_head"),
]


@pytest.fixture(scope="module")
def adapters(
    tiny_targets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[LoRARequest]:
    root = tmp_path_factory.mktemp("adapters")
    target = tiny_targets["llama"]
    save_adapter(target, root / "all", EVERYWHERE, seed=1)
    save_adapter(target, root / "attention", ["q_proj", "v_proj"], seed=2)
    return [
        LoRARequest(name, number, str(root / name))
        for number, name in enumerate(("all", "attention"), start=1)
    ]


def each(llm: LLM, adapters: Sequence[LoRARequest | None], **more: Any) -> Any:
    """The prompts at once, each with its adapter or none."""
    return generate(llm, PROMPTS, LENGTH, lora_request=list(adapters), **more)


@pytest.mark.parametrize(
    "name",
    [
        "shared-4",
        pytest.param("mixed", marks=[pytest.mark.slow] if ON_V2 else ()),
        pytest.param("own-some", marks=pytest.mark.slow),
    ],
)
def test_every_request_has_its_adapters_answer(
    name: str,
    adapters: list[LoRARequest],
    tiny_targets: dict[str, Path],
    tiny_drafter: Drafter,
) -> None:
    target = tiny_targets["llama"]
    spec = {"method": "mtp_placeholder", "model": str(tiny_drafter("llama", name))}
    one, other = adapters
    batches = [[None] * 4, [one, None, other, one], [other] * 4]
    with engine(target, **SETTINGS) as llm:
        alone = [each(llm, batch) for batch in batches]
    with engine(target, spec, **SETTINGS) as llm:
        runs = [each(llm, batch) for batch in batches]
    for run, expected in zip(runs, alone, strict=True):
        assert run.token_ids == expected.token_ids
        assert run.counts.drafts > 10
    texts = [run.token_ids for run in alone]
    assert all(a != b for a, b in zip(texts[0], texts[2], strict=True))
    without, mixed, _ = (run.counts for run in runs)
    # Drafts are those of the target without an adapter: right there, and elsewhere
    # only where both agree.
    if name == "shared-4":
        assert without.accepted_per_position[0] == without.drafts
    assert 0 < mixed.accepted_per_position[0] < mixed.drafts


def test_experts_with_adapters_are_refused() -> None:
    model = nn.Module()
    model.experts = FusedMoEWithLoRA.__new__(FusedMoEWithLoRA)
    nn.Module.__init__(model.experts)
    with pytest.raises(UnsupportedTargetError, match="the experts of experts"):
        without_adapters(model)


def test_a_target_without_adapters_stays_what_it_is() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert without_adapters(model) is model
