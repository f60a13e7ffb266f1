# SPDX-License-Identifier: Apache-2.0
"""What is compared: targets, and the ways to draft for them.

A side is named by what drafts: ``none``; the layers of one of our drafters, such as
``own:0,8,16,23,31``, with ``@32000`` behind them for a reduced output vocabulary; or
``eagle3``, vLLM's own method with a drafter of the published size. All weights are
random, and the large ones are made on the device.
"""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

from vllm_mtp.drafter.checkpoint import save_drafter
from vllm_mtp.drafter.config import DrafterConfig, OwnLayerConfig, SharedLayerConfig
from vllm_mtp.drafter.layer_spec import ListedLayer, parse_layers
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.plugin import METHOD

# Llama-3.1-8B, and a tiny one for the dry run.
SHAPES: dict[str, PreTrainedConfig] = {
    "llama-8b": LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
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


def own_layers(shape: str) -> str:
    """Five own layers spread over the target, drafting from as many tokens as
    EAGLE-3."""
    config = SHAPES[shape]
    last = config.num_hidden_layers - 1
    spread = ",".join(str(round(last * i / 4)) for i in range(5))
    return f"own:{spread}@{min(32000, config.vocab_size // 2)}"


def mixed_layers(shape: str) -> str:
    """The target's first layers as they are, and its last ones of our own."""
    last = SHAPES[shape].num_hidden_layers - 1
    return f"shared:0-{max(last // 10, 1)},own:{last - 1},{last}"


def make_shape(name: str, folder: Path) -> Path:
    """A target without weights, for vLLM to make up; returns its folder."""
    SHAPES[name].save_pretrained(folder)
    return folder


def make_exact_target(folder: Path) -> Path:
    """Save a tiny Llama whose next token depends on the text; returns its folder."""
    from checkpoints_spec.goldens import fill_weights

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # attention kernels of GPUs know few sizes
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        fill_weights(model, std=0.3)
    model.save_pretrained(folder)
    return folder


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
    folder = work / f"{target.name}-{side.replace(':', '-').replace(',', '.')}"
    count = {"num_speculative_tokens": num_tokens, "model": str(folder)}
    if side == "eagle3":
        _eagle3(target).save_pretrained(folder)
        return {"method": side} | count
    if not folder.exists():
        layers, _, vocab = side.partition("@")
        save_drafter(_untrained(target, layers, num_tokens, int(vocab or 0)), folder)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # vLLM counts what is free
    # Graphs of its own, where the target has any.
    return {"method": METHOD, "enforce_eager": False} | count


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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drafter.to_empty(device=device)
    drafter.init_weights(torch.Generator(device).manual_seed(0))
    if drafter.placeholders is not None:
        torch.nn.init.normal_(drafter.placeholders, std=0.02)
    if drafter.draft_vocab is not None:
        chosen = random.Random(0).sample(range(facts.vocab_size), draft_vocab_size)
        drafter.draft_vocab.token_ids.copy_(torch.tensor(sorted(chosen)))
    return drafter


def _layer(
    bound: ListedLayer, facts: TargetFacts, hf_config: Any
) -> SharedLayerConfig | OwnLayerConfig:
    assert bound.target_layer is not None, "no side has MLP layers"
    if bound.kind == "shared":
        return SharedLayerConfig(target_layer=bound.target_layer)
    return OwnLayerConfig(
        target_layer=bound.target_layer,
        intermediate_size=hf_config.intermediate_size,
        rms_norm_eps=hf_config.rms_norm_eps,
        qk_norm=facts.model_type == "qwen3",
    )


def _eagle3(target: Path) -> PreTrainedConfig:
    """The config of EAGLE-3's drafter as they are published: one layer of the target's
    size, and 32,000 tokens."""
    sizes = AutoConfig.from_pretrained(target).to_dict()
    for key in ("architectures", "model_type", "transformers_version", "layer_types"):
        sizes.pop(key, None)
    draft_vocab = min(32000, sizes["vocab_size"] // 2)
    sizes |= {"num_hidden_layers": 1, "draft_vocab_size": draft_vocab}
    return LlamaConfig(**sizes, architectures=["LlamaForCausalLMEagle3"])
