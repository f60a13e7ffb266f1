# SPDX-License-Identifier: Apache-2.0
"""The public vLLM recipes that use speculation, and what becomes of each with us.

Counted in github.com/vllm-project/recipes at 8959cf64 (2026-08-21): 57 of 173. Five
name the class of their model; the others' were found in vLLM's registry, and nine of
them are likely, not certain (marked *).
"""

from collections import Counter
from typing import NamedTuple

from vllm_mtp.families import FAMILIES, Family, Served, families_of
from vllm_mtp.markdown import plain, table


class Recipes(NamedTuple):
    """Recipes of one architecture."""

    architecture: str
    count: int
    models: str
    family: str = ""  # where an architecture is not of one family alone


RECIPES = (
    Recipes("Qwen3_5ForConditionalGeneration", 6, "Qwen3.5, 3.6 and 3.8, dense"),
    Recipes("Qwen3_5MoeForConditionalGeneration", 4, "Qwen3.5 and 3.6, MoE"),
    Recipes("Qwen3_5MoeForCausalLM", 1, "Qwen3.8-2.4T*"),
    Recipes("InternS2PreviewForConditionalGeneration", 1, "Intern-S2-Preview"),
    Recipes("Qwen3VLMoeForConditionalGeneration", 1, "Qwen3-VL-235B"),
    Recipes("GlmOcrForConditionalGeneration", 1, "GLM-OCR"),
    Recipes("Glm4MoeForCausalLM", 3, "GLM-4.5, 4.6, 4.7"),
    Recipes("HYV3ForCausalLM", 2, "Hy3*"),
    Recipes("Qwen3NextForCausalLM", 1, "Qwen3-Next-80B"),
    Recipes("GptOssForCausalLM", 1, "gpt-oss-120b"),
    Recipes("Ernie4_5_MoeForCausalLM", 1, "ERNIE-4.5-21B"),
    Recipes("LlamaForCausalLM", 1, "Llama-3.1-8B"),
    Recipes("PixtralForConditionalGeneration", 1, "Mistral-Medium-3.5*"),
    Recipes("Gemma4ForConditionalGeneration", 2, "Gemma 4 26B and 31B"),
    Recipes("Gemma4UnifiedForConditionalGeneration", 1, "Gemma 4 12B"),
    Recipes(
        "Gemma4ForConditionalGeneration",
        2,
        "Gemma 4 E2B and E4B",
        "Gemma 3n, Gemma 4 E-series",
    ),
    Recipes("LagunaForCausalLM", 3, "Laguna"),
    Recipes("MiMoV2ForCausalLM", 1, "MiMo-V2.5-Pro*"),
    Recipes("MiMoV2OmniForCausalLM", 1, "MiMo-V2.5*"),
    Recipes("MuseGlimmerForConditionalGeneration", 1, "Muse-Glimmer-30B"),
    Recipes("NemotronHForCausalLM", 3, "Nemotron 3*"),
    Recipes("Step3p5ForCausalLM", 1, "Step-3.5-Flash"),
    Recipes("Step3p7ForConditionalGeneration", 1, "Step-3.7-Flash"),
    Recipes("InklingForConditionalGeneration", 2, "Inkling"),
    Recipes("KimiK25ForConditionalGeneration", 3, "Kimi K2.5, 2.6, 2.7"),
    Recipes(
        "Mistral3ForConditionalGeneration",
        1,
        "Mistral Small 4*",
        "DeepSeek V2 and V3, Kimi K2, Mistral 4, GLM-4.7-Flash",
    ),
    Recipes("DeepseekV32ForCausalLM", 1, "DeepSeek V3.2"),
    Recipes("DeepseekV4ForCausalLM", 2, "DeepSeek V4"),
    Recipes("GlmMoeDsaForCausalLM", 4, "GLM-5, Macaron"),
    Recipes("Dots3NoteForCausalLM", 1, "dots3"),
    Recipes("KimiK3ForConditionalGeneration", 1, "Kimi K3"),
    Recipes("BailingMoeV3ForCausalLM", 1, "Ling 3*"),
    Recipes("MiniMaxM3SparseForConditionalGeneration", 1, "MiniMax-M3"),
)


def family_of(recipes: Recipes) -> Family:
    """The row that says most of an architecture."""
    if recipes.family:
        return next(family for family in FAMILIES if family.name == recipes.family)
    return families_of([recipes.architecture])[0]


def counts() -> Counter[Served]:
    """Recipes by what is known of serving them on V1."""
    found: Counter[Served] = Counter()
    for recipes in RECIPES:
        found[family_of(recipes).v1] += recipes.count
    return found


def recipes_table() -> str:
    """One row per architecture, and the sums."""
    found = counts()
    exact = found[Served.EXACT] + found[Served.TIES]
    sums = (
        f"Of {sum(found.values())} recipes: {exact} exact on a tiny target "
        f"({found[Served.TIES]} of them up to ties in bfloat16), "
        f"{found[Served.NOT_RUN]} accepted and not run, "
        f"{found[Served.REFUSED]} refused."
    )
    rows = [
        (
            f"`{recipes.architecture}`",
            str(recipes.count),
            recipes.models,
            (family := family_of(recipes)).v1.value,
            plain(family.note),
        )
        for recipes in RECIPES
    ]
    head = ("Architecture", "Recipes", "Models", "Here", "Limits")
    return f"{sums}\n\n{table(head, rows)}"
