# SPDX-License-Identifier: Apache-2.0
"""What is known of each family of targets: the one table.

`vllm-mtp doctor --target`, docs/targets.md and the tests of every family are made from
it. A family that is not in it may work: at start the target's layers are watched
(`drafter.followed`), and one that our host does not reproduce is refused.
"""

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple


class Served(Enum):
    """What is known of serving a family on one runner."""

    EXACT = "exact"
    TIES = "exact up to ties"
    NOT_RUN = "accepted, not run"
    REFUSED = "refused"


class Own(Enum):
    """What own layers can start from."""

    COPY = "copy"
    RANDOM = "random"
    NONE = "none"
    UNKNOWN = "not tried"


class Family(NamedTuple):
    """Targets whose layers are alike.

    Attributes:
        name: As people call it.
        architectures: As in a config's ``architectures``.
        v1: On vLLM's V1 runner.
        v2: On its V2 runner.
        shared: Whether drafters can run the target's own layers.
        own: What own layers start from.
        trains: Whether `vllm-mtp train` takes it.
        tested: Tiny targets of `tests.tiny_targets` that stand for it.
        note: What limits it, or how it was compared.
    """

    name: str
    architectures: tuple[str, ...]
    v1: Served
    v2: Served
    shared: bool
    own: Own
    trains: bool
    tested: tuple[str, ...] = ()
    note: str = ""


_EXACT, _TIES = Served.EXACT, Served.TIES
_NOT_RUN, _REFUSED = Served.NOT_RUN, Served.REFUSED
_SIGMOID = "experts not run: vLLM's router on CPUs knows softmax alone"
_MLA = "multi-head latent attention: no keys and values per head"
_INDEXER = "sparse attention with an indexer"


def _exact(
    name: str,
    *architectures: str,
    own: Own = Own.COPY,
    tested: tuple[str, ...],
    note: str = "",
) -> Family:
    return Family(name, architectures, _EXACT, _EXACT, True, own, True, tested, note)


def _hybrid(name: str, *architectures: str, own: Own, tested: str) -> Family:
    note = "own layers on the layers with full attention; in bfloat16"
    return Family(name, architectures, _TIES, _TIES, False, own, True, (tested,), note)


def _refused(name: str, *architectures: str, why: str) -> Family:
    return Family(
        name, architectures, _REFUSED, _REFUSED, False, Own.NONE, False, (), why
    )


def _not_run(
    name: str,
    *architectures: str,
    shared: bool = True,
    tested: tuple[str, ...] = (),
    why: str,
) -> Family:
    own, trains = Own.UNKNOWN, True
    return Family(
        name, architectures, _NOT_RUN, _NOT_RUN, shared, own, trains, tested, why
    )


FAMILIES: tuple[Family, ...] = (
    _exact("Llama", "LlamaForCausalLM", tested=("llama",)),
    _exact(
        "Llama with dynamic or YaRN RoPE",
        "LlamaForCausalLM",
        tested=("llama_dynamic", "llama_yarn"),
        note="also by `--hf-overrides`",
    ),
    _exact("Mistral", "MistralForCausalLM", tested=("mistral",)),
    _exact("Qwen2", "Qwen2ForCausalLM", tested=("qwen2",)),
    _exact("Qwen3", "Qwen3ForCausalLM", tested=("qwen3",)),
    _exact("Qwen3-MoE", "Qwen3MoeForCausalLM", own=Own.RANDOM, tested=("qwen3_moe",)),
    _hybrid("Qwen3-Next", "Qwen3NextForCausalLM", own=Own.RANDOM, tested="qwen3_next"),
    _hybrid(
        "Qwen3.5 to 3.8, dense",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5ForCausalLM",
        own=Own.COPY,
        tested="qwen3_5",
    ),
    _hybrid(
        "Qwen3.5 to 3.8, MoE",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeForCausalLM",
        own=Own.RANDOM,
        tested="qwen3_5_moe",
    ),
    _exact("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", tested=("qwen2_5_vl",)),
    _exact("Qwen3-VL", "Qwen3VLForConditionalGeneration", tested=("qwen3_vl",)),
    _not_run(
        "Qwen3-VL-MoE",
        "Qwen3VLMoeForConditionalGeneration",
        why="transformers 5 saves its experts in a shape that vLLM 0.32 does not load",
    ),
    _exact("GLM-OCR", "GlmOcrForConditionalGeneration", tested=("glm_ocr",)),
    _exact("GLM-4", "Glm4ForCausalLM", tested=("glm4",)),
    _exact(
        "GLM-4.5 to 4.7", "Glm4MoeForCausalLM", own=Own.RANDOM, tested=("glm4_moe",)
    ),
    _exact("Gemma 2", "Gemma2ForCausalLM", tested=("gemma2",)),
    _exact("Gemma 3, text", "Gemma3ForCausalLM", tested=("gemma3",)),
    _exact("Gemma 3", "Gemma3ForConditionalGeneration", tested=("gemma3_mm",)),
    _exact(
        "Gemma 4 without per-layer embeddings",
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForConditionalGeneration",
        tested=("gemma4",),
        note="two head sizes; compared as the text model alone, without experts",
    ),
    _exact("gpt-oss", "GptOssForCausalLM", own=Own.RANDOM, tested=("gpt_oss",)),
    _exact(
        "MiniMax-M2",
        "MiniMaxM2ForCausalLM",
        own=Own.RANDOM,
        tested=("minimax_m2",),
        note=f"with one expert; {_SIGMOID}",
    ),
    _exact("Ernie 4.5", "Ernie4_5ForCausalLM", tested=("ernie4_5",)),
    _exact(
        "Ernie 4.5 MoE",
        "Ernie4_5_MoeForCausalLM",
        own=Own.RANDOM,
        tested=("ernie4_5_moe",),
    ),
    _exact("EXAONE 4", "Exaone4ForCausalLM", tested=("exaone4",)),
    _exact("Command-A, Cohere 2", "Cohere2ForCausalLM", tested=("cohere2",)),
    _exact(
        "OLMo 3",
        "Olmo3ForCausalLM",
        tested=("olmo3",),
        note="vLLM's Transformers backend",
    ),
    _exact(
        "SmolLM3",
        "SmolLM3ForCausalLM",
        tested=("smollm3",),
        note="vLLM's Transformers backend; some layers without RoPE",
    ),
    _exact(
        "Seed-OSS",
        "SeedOssForCausalLM",
        tested=("seed_oss",),
        note="vLLM's Transformers backend",
    ),
    _exact("Granite 3", "GraniteForCausalLM", tested=("granite",)),
    _exact("LLaVA", "LlavaForConditionalGeneration", tested=("llava",)),
    _exact(
        "Mistral Small 3",
        "Mistral3ForConditionalGeneration",
        tested=("mistral3",),
        note="not with Mistral 4's text part (latent attention)",
    ),
    _not_run(
        "Mistral in its own format, Pixtral",
        "PixtralForConditionalGeneration",
        why="its text part is Mistral's; training wants a Hugging Face folder",
    ),
    _exact(
        "Phi-3 and 4",
        "Phi3ForCausalLM",
        tested=("phi3", "phi3_longrope"),
        note="also with long RoPE",
    ),
    _exact(
        "Laguna",
        "LagunaForCausalLM",
        own=Own.RANDOM,
        tested=("laguna",),
        note=f"dense; {_SIGMOID}",
    ),
    _exact(
        "MiMo-V2",
        "MiMoV2ForCausalLM",
        "MiMoV2FlashForCausalLM",
        "MiMoV2OmniForCausalLM",
        own=Own.RANDOM,
        tested=("mimo_v2",),
        note="dense, with values as wide as keys; own layers only then",
    ),
    _exact(
        "Muse Glimmer",
        "MuseGlimmerForConditionalGeneration",
        own=Own.RANDOM,
        tested=("muse_glimmer",),
        note="some layers without RoPE",
    ),
    _not_run(
        "Phi-3.5-MoE",
        "PhiMoEForCausalLM",
        tested=("phimoe",),
        why="vLLM 0.32 on a CPU ends when it runs the target alone",
    ),
    _not_run(
        "HY-V3",
        "HYV3ForCausalLM",
        why=_SIGMOID,
    ),
    _not_run(
        "Intern-S2",
        "InternS2PreviewForConditionalGeneration",
        shared=False,
        why="as Qwen3.5 MoE, of which vLLM's class is a subclass",
    ),
    _not_run(
        "Nemotron-H, Nemotron 3",
        "NemotronHForCausalLM",
        shared=False,
        tested=("nemotron_h",),
        why="own layers on the attention layers, which have no RoPE; vLLM's Mamba-2 "
        "code for CPUs ends in an IndexError, with the target alone",
    ),
    _refused(
        "Gemma 3n, Gemma 4 E-series",
        "Gemma3nForConditionalGeneration",
        why="each layer reads an embedding of its own",
    ),
    _refused(
        "Llama 4",
        "Llama4ForConditionalGeneration",
        why="chunked attention is not trained, and vLLM stores other keys than "
        "transformers",
    ),
    _refused(
        "Step-3.5",
        "Step3p5ForCausalLM",
        "Step3p7ForConditionalGeneration",
        why="the model's last norm is in its head, behind what drafters read",
    ),
    _refused(
        "DeepSeek V2 and V3, Kimi K2, Mistral 4, GLM-4.7-Flash",
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "KimiK25ForConditionalGeneration",
        "Glm4MoeLiteForCausalLM",
        why=_MLA,
    ),
    _refused(
        "DeepSeek V3.2 and V4, GLM-5, dots3",
        "DeepseekV32ForCausalLM",
        "DeepseekV4ForCausalLM",
        "GlmMoeDsaForCausalLM",
        "Dots3NoteForCausalLM",
        why=f"{_MLA}; {_INDEXER}",
    ),
    _refused(
        "Kimi K3, Ling 3",
        "KimiK3ForConditionalGeneration",
        "BailingMoeV3ForCausalLM",
        why=f"{_MLA}, beside linear attention",
    ),
    _refused(
        "MiniMax-M3",
        "MiniMaxM3SparseForConditionalGeneration",
        why=_INDEXER,
    ),
    _refused(
        "Inkling",
        "InklingForConditionalGeneration",
        why="relative attention and short convolutions",
    ),
)


def families_of(architectures: Iterable[str]) -> list[Family]:
    """The rows for a config's ``architectures``."""
    wanted = set(architectures)
    return [family for family in FAMILIES if wanted.intersection(family.architectures)]
