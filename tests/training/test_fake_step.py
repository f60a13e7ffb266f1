# SPDX-License-Identifier: Apache-2.0
"""A step of tensors without storage keeps what a real step keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig, Qwen3Config

from tests.tiny_answers import MakeArguments
from vllm_mtp.torch_host.at_once import as_on_gpu
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import class_of
from vllm_mtp.torch_host.new_drafter import new_drafter
from vllm_mtp.torch_host.without_weights import BareTarget, drafter_config
from vllm_mtp.training.fake_step import fake_step, watched_step
from vllm_mtp.training.loss_module import LossModule
from vllm_mtp.training.loss_vocabulary import LossVocabulary
from vllm_mtp.training.memory_watch import MemoryWatch
from vllm_mtp.training.step_memory import DRAFTER, OPTIMIZER, TARGET

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
KINDS: dict[str, dict[str, Any]] = {
    "own": {
        "layers": "own:0,2",
        "bridges": True,
        "boundary_hidden": "all",
        "markov_rank": 8,
        "tv_weight": 0.5,
        "teacher_tokens": 0,
    },
    "shared": {
        "layers": "shared:all",
        "lora_rank": 4,
        "lora_modules": ["q_proj", "down_proj"],
        "loss_vocab_size": 50,
    },
    "on-policy": {"layers": "own:0,2", "on_policy_weight": 0.5, "kl_weight": 0.5},
    "walk": {
        "layers": "own:0,2",
        "unvisited_weight": 0.3,
        "acceptance_weight": 1.0,
        "markov_rank": 8,
        "loss_vocab_size": 50,
        "ema_decay": 0.9,
    },
    "chain's walk": {"layers": "own:0,2", "chain": True, "unvisited_weight": 0.3},
    "heads": {
        "layers": "mlp:2",
        "input": "boundary",
        "per_position": True,
        "lm_head": "own",
        "boundary_layers": [2, 0],
    },
    "chain": {
        "layers": "own:0,2",
        "chain": True,
        "boundary_hidden": "first",
        "loss_vocab_size": 50,
    },
    "others": {
        "layers": "shared:1,own:2,mlp:1",
        "mlp_form": "plain",
        "full_rank_modules": ["up_proj"],
        "own_attention": "block",
        "block_mask": "bidirectional",
        "extra_rows": 2,
        "boundary_hidden": "all",
        "boundary_of": "bound",
    },
}


def test_the_watch_counts_as_torchs_tracker_does() -> None:
    def work() -> torch.Tensor:
        x = torch.randn(64, 32)
        for _ in range(3):
            x = torch.tanh(x @ weight) + x.softmax(-1)
        loss = x.square().mean()
        loss.backward()
        return loss

    weight = torch.nn.Parameter(torch.randn(32, 32))
    watch, tracker = MemoryWatch(), MemTracker()
    watch.count(weight, "weight")
    with watch:
        work()
    weight.grad = None
    tracker.track_external(weight)
    with tracker:
        work()
    (found,) = tracker.get_tracker_snapshot("peak").values()
    assert sum(watch.peak.values()) == found["Total"]
    assert watch.peak["weight"] == 32 * 32 * 4


def test_a_label_holds_inside_its_block() -> None:
    watch = MemoryWatch()
    with watch, watch.labelled("inner"):
        kept = torch.zeros(10)
        torch.zeros(1000).sum()
    with watch:
        torch.zeros(2000)
    assert watch.peak == {"inner": kept.nbytes, "other": 8000}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("own", {"bf16": True}),
        ("shared", {"bf16": False}),
        ("shared", {"bf16": True, "gradient_checkpointing": True}),
        ("on-policy", {"bf16": True, "gradient_checkpointing": True}),
        ("walk", {"bf16": True}),
        ("chain's walk", {"bf16": False}),
        ("heads", {"bf16": True}),
        ("chain", {"bf16": True, "gradient_checkpointing": True}),
        ("others", {"bf16": False, "gradient_checkpointing": True}),
    ],
)
def test_a_fake_step_is_as_large_as_a_real_one(
    arguments: MakeArguments, kind: str, more: dict[str, Any], tmp_path: Path
) -> None:
    config = Qwen3Config(**SIZES)
    args = arguments(
        **KINDS[kind],
        **more,
        max_text_tokens=100,
        anchors_per_text=20,
        states_budget_gb=0,
    )
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = class_of(config).from_config(config, dtype=dtype).eval()
    model.requires_grad_(False).save_pretrained(tmp_path)
    drafter = new_drafter(tmp_path, args.layers, args.num_speculative_tokens, args)
    assert drafter.config == drafter_config(
        BareTarget(config), args.layers, args.num_speculative_tokens, args
    ).model_copy(update={"target": drafter.config.target})
    candidates = None
    if args.loss_vocab_size:
        candidates = LossVocabulary(torch.arange(args.loss_vocab_size), 300)
    module = LossModule(drafter, HFTarget(model), args.plan(), candidates)
    if args.gradient_checkpointing:
        module.gradient_checkpointing_enable()
    texts = [
        {
            "index": index,
            "input_ids": torch.arange(100) % 300,
            "loss_spans": [[10, 100]],
        }
        for index in range(args.per_device_train_batch_size)
    ]
    with as_on_gpu():
        real = watched_step(module, texts, args, MemoryWatch())
    fake = fake_step(BareTarget(config), args)
    print(fake.peak, real.peak)
    assert fake.total == pytest.approx(real.total, rel=0.01)
    for kept in (TARGET, DRAFTER, OPTIMIZER):
        assert fake.peak[kept] == real.peak[kept] > 0


def test_a_family_without_head_dim_goes_too(arguments: MakeArguments) -> None:
    config = LlamaConfig(**SIZES | {"head_dim": None})
    args = arguments(**KINDS["shared"], max_text_tokens=64)
    assert fake_step(BareTarget(config), args).total > 0
