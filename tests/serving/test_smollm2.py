# SPDX-License-Identifier: Apache-2.0
"""The real target on real prompts: SmolLM2-135M-Instruct, ShareGPT."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.engines import Run, engine, generate, num_kv_blocks
from vllm_mtp.checkpoint import save_drafter
from vllm_mtp.evaluation.equality import BF16_TIE_MARGIN, compare_greedy
from vllm_mtp.modeling.init import DrafterOptions, new_drafter

pytestmark = pytest.mark.engine

Spec = dict[str, Any] | None
SETTINGS: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "block_size": 32,
    # Most prompts are longer than half of this: prefill is chunked.
    "max_num_batched_tokens": 256,
}
MAX_TOKENS = 32
# name: (layers, k); "reference" is what the method finds on its own.
DRAFTERS = {
    "shared-1": ("shared:all", 1),
    "own-1": ("own:all", 1),
    "own-some": ("own:0,7,14,22,29", 4),
    "mixed": ("shared:0-9,own:28,29", 4),
}


@pytest.fixture(scope="module")
def drafter_spec(
    smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Spec]:
    root = tmp_path_factory.mktemp("smollm2-drafters")

    def make(name: str) -> Spec:
        if name == "reference":
            return {"method": "mtp_placeholder"}
        layers, k = DRAFTERS[name]
        options = DrafterOptions(boundary_hidden=name == "mixed")
        folder = save_drafter(new_drafter(smollm2, layers, k, options), root / name)
        return {"method": "mtp_placeholder", "model": str(folder)}

    return make


@pytest.fixture(scope="module")
def answer(
    smollm2: Path, smollm2_prompts: list[list[int]]
) -> Iterator[Callable[[str, Spec], tuple[Run, int]]]:
    """Answer all prompts on a new engine; also gives the size of its KV pool."""

    def run(dtype: str, spec: Spec) -> tuple[Run, int]:
        with engine(smollm2, spec, dtype=dtype, **SETTINGS) as llm:
            return generate(llm, smollm2_prompts, MAX_TOKENS), num_kv_blocks(llm)

    return run


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def plain(
    request: pytest.FixtureRequest, answer: Callable[[str, Spec], tuple[Run, int]]
) -> tuple[str, Run, int]:
    return request.param, *answer(request.param, None)


@pytest.mark.parametrize(
    "name", ["shared-1", "own-1", "own-some", "mixed", "reference"]
)
def test_real_prompts(
    name: str,
    plain: tuple[str, Run, int],
    answer: Callable[[str, Spec], tuple[Run, int]],
    drafter_spec: Callable[[str], Spec],
) -> None:
    dtype, reference, plain_blocks = plain
    if dtype == "float32" and name in ("own-some", "reference"):
        pytest.skip("covered in bfloat16; every engine costs time")
    run, num_blocks = answer(dtype, drafter_spec(name))

    assert num_blocks == plain_blocks
    margin = BF16_TIE_MARGIN if dtype == "bfloat16" else 0.0
    results = [
        compare_greedy(a, logprobs, b, tie_margin=margin)
        for a, logprobs, b in zip(
            reference.token_ids, reference.logprobs, run.token_ids, strict=True
        )
    ]
    assert [r for r in results if r.verdict == "different"] == []
    first = run.counts.acceptance_per_place[0]
    print(
        f"\n{dtype} {name}: first place {first:.4f}, acceptance length "
        f"{run.counts.acceptance_length:.3f}, {run.counts.drafts} drafts, equal "
        f"{sum(r.verdict == 'equal' for r in results)} of {len(results)}"
    )
    if name in ("shared-1", "own-1", "reference"):
        assert first == 1.0 if dtype == "float32" else first >= 0.995
