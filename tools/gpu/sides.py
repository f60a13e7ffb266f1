# SPDX-License-Identifier: Apache-2.0
"""What is compared: targets, and the ways to draft for them.

A side is named by what drafts: ``none``; the layers of one of our drafters, such as
``own:0,8,16,24,31``, with ``@32000`` behind them for a reduced output vocabulary; the
name of an installed drafter; or ``eagle3`` or ``dflash``, vLLM's own methods with a
drafter of the usual size. Drafters that are made here are not trained.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from vllm_mtp.drafter.checkpoint import save_drafter
from vllm_mtp.drafter.config import DrafterConfig, OwnLayerConfig, SharedLayerConfig
from vllm_mtp.drafter.layer_spec import BoundLayer, parse_layers
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.installed import installed_drafters
from vllm_mtp.plugin import METHOD

PROMPTS = Path(__file__).parents[2] / "examples/prompts/unseen.jsonl"

# Sizes of Llama-3.1-8B and Qwen3-8B, and tiny ones for a dry run.
_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, PreTrainedConfig] = {
    "llama-8b": LlamaConfig(
        **_8B,
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        intermediate_size=14336,
        num_hidden_layers=32,
        max_position_embeddings=131072,
    ),
    "qwen3-8b": Qwen3Config(
        **_8B,
        architectures=["Qwen3ForCausalLM"],
        vocab_size=151936,
        intermediate_size=12288,
        num_hidden_layers=36,
        max_position_embeddings=40960,
    ),
    "tiny": LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=8,  # EAGLE-3 reads three different ones
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
    ),
}


def make_shape(name: str, folder: Path) -> Path:
    """A target without weights, for vLLM to make up; returns its folder."""
    SHAPES[name].save_pretrained(folder)
    return folder


def usual_sides(shape: str) -> list[str]:
    """The target alone, our two kinds of drafters, and a peer."""
    last = SHAPES[shape].num_hidden_layers - 1
    spread = ",".join(str(round(last * i / 4)) for i in range(5))
    mixed = f"shared:0-{max(last // 10, 1)},own:{last - 1},{last}"
    return ["none", f"own:{spread}", mixed, "eagle3"]


def target_with_weights(name: str, work: Path) -> Path:
    """The demo's target, a tiny one, or a folder."""
    if name == "demo":
        from vllm_mtp.data.demo_target import ensure_demo_target

        return ensure_demo_target()
    if name == "tiny":
        from tests.tiny_targets import make_tiny_llama

        # Attention kernels for GPUs know few head sizes.
        return make_tiny_llama(work / "tiny", head_dim=64)
    return Path(name)


def prompts_for(target: Path, limit: int) -> list[list[int]]:
    """Real questions in the target's chat format; noise if it has no tokenizer."""
    if not (target / "tokenizer.json").exists():
        draw = random.Random(0)
        return [draw.choices(range(512), k=20 + i) for i in range(limit)]
    tokenizer = AutoTokenizer.from_pretrained(target)
    lines = PROMPTS.read_text("utf-8").splitlines()[:limit]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": json.loads(line)["prompt"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for line in lines
    ]


def speculative_config(
    side: str, target: Path, num_tokens: int, work: Path
) -> dict[str, Any] | None:
    """vLLM's ``speculative_config`` of a side; makes its drafter if need be.

    Args:
        side: Its name.
        target: The target's folder.
        num_tokens: k, the tokens to draft per step.
        work: Folder for drafters.
    """
    if side == "none":
        return None
    installed = {drafter.name: drafter for drafter in installed_drafters()}
    if side in installed:
        return {"method": METHOD, "model": str(installed[side].folder())}
    folder = work / f"{target.name}-{side.replace(':', '-').replace(',', '.')}"
    if side in ("eagle3", "dflash"):
        _peer(side, target).save_pretrained(folder)
        model = {"method": side, "model": str(folder)}
        return model | {"num_speculative_tokens": num_tokens}
    if not folder.exists():
        layers, _, vocab = side.partition("@")
        drafter = _untrained(target, layers, num_tokens, int(vocab or 0))
        save_drafter(drafter, folder)
    return {"method": METHOD, "model": str(folder)}


def _untrained(
    target: Path, layers: str, num_tokens: int, draft_vocab_size: int
) -> Drafter:
    """One of our drafters with random weights: the target may have none to copy."""
    facts = TargetFacts.from_folder(target)
    hf_config = AutoConfig.from_pretrained(target)
    config = DrafterConfig(
        model_type=METHOD,
        format_version=1,
        num_speculative_tokens=num_tokens,
        layers=tuple(
            _layer(bound, facts, hf_config)
            for bound in parse_layers(layers, facts.num_hidden_layers)
        ),
        draft_vocab_size=draft_vocab_size or None,
        dtype="bfloat16",
        target=facts,
    )
    with torch.device("meta"):
        drafter = Drafter(config).to(torch.bfloat16)
    drafter.to_empty(device="cpu")
    drafter.init_weights(torch.Generator().manual_seed(0))
    if drafter.placeholders is not None:
        torch.nn.init.normal_(drafter.placeholders, std=0.02)
    if drafter.draft_vocab is not None:
        chosen = random.Random(0).sample(range(facts.vocab_size), draft_vocab_size)
        drafter.draft_vocab.token_ids.copy_(torch.tensor(sorted(chosen)))
    return drafter


def _layer(
    bound: BoundLayer, facts: TargetFacts, hf_config: Any
) -> SharedLayerConfig | OwnLayerConfig:
    if bound.kind == "shared":
        return SharedLayerConfig(target_layer=bound.target_layer)
    return OwnLayerConfig(
        target_layer=bound.target_layer,
        intermediate_size=hf_config.intermediate_size,
        rms_norm_eps=hf_config.rms_norm_eps,
        qk_norm=facts.model_type == "qwen3",
    )


def _peer(method: str, target: Path) -> PreTrainedConfig:
    """The config of a peer's drafter, of the size in which they are published: one
    layer and 32,000 tokens for EAGLE-3, five layers for DFlash."""
    sizes = AutoConfig.from_pretrained(target).to_dict()
    for key in ("architectures", "model_type", "transformers_version", "layer_types"):
        sizes.pop(key, None)
    vocab, last = sizes["vocab_size"], sizes["num_hidden_layers"] - 1
    if method == "eagle3":
        sizes |= {"num_hidden_layers": 1, "draft_vocab_size": min(32000, vocab // 2)}
        return LlamaConfig(**sizes, architectures=["LlamaForCausalLMEagle3"])
    sizes.pop("max_window_layers", None)
    read = sorted({round(last * i / 4) for i in range(5)})
    sizes |= {
        "num_hidden_layers": 5,
        "dflash_config": {"mask_token_id": vocab - 1, "target_layer_ids": read},
    }
    return Qwen3Config(**sizes, architectures=["DFlashDraftModel"])
