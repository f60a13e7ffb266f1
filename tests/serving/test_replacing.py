# SPDX-License-Identifier: Apache-2.0
"""Weights that change while an engine serves: the drafter's, and the target's."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

from tests.serving.engines import (
    ON_V2,
    bound_drafter_of,
    engine,
    generate,
    runner_of,
)
from vllm_mtp.drafter.checkpoint import load_drafter, save_drafter
from vllm_mtp.engine import drafter_of
from vllm_mtp.errors import MTPError
from vllm_mtp.serving import loading
from vllm_mtp.serving.config import keep_drafter_asleep
from vllm_mtp.serving.faults import MAX_FAILURES

pytestmark = pytest.mark.engine

PROMPTS = [[(7 * i + j) % 512 for i in range(20 + 9 * j)] for j in range(3)]
LENGTH = 8 if ON_V2 else 24

Drafter = Callable[[str, str], Path]


def spec_for(folder: Path) -> dict[str, Any]:
    return {"method": "mtp_placeholder", "model": str(folder)}


def changed(folder: Path, out: Path) -> Path:
    """The same drafter with other weights, which draft something else."""
    drafter = load_drafter(folder)
    generator = torch.Generator().manual_seed(0)
    for weight in drafter.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=generator) * 0.3)
    save_drafter(drafter, out)
    return out


def replace(llm: LLM, folder: Path) -> None:
    (answer,) = llm.collective_rpc("replace_drafter", args=(str(folder),))
    assert answer == {"drafter": str(folder), "error": None}


def refusal(llm: LLM, folder: Path) -> str:
    (answer,) = llm.collective_rpc("replace_drafter", args=(str(folder),))
    assert answer["drafter"] != str(folder)
    error: str = answer["error"]
    return error


def replaced_after(steps: int, llm: LLM, folder: Path) -> list[list[int]]:
    """Answers of requests that are under way when the drafter is replaced."""
    core, answers = llm.llm_engine, {}
    params = SamplingParams(
        temperature=0.0, max_tokens=LENGTH, ignore_eos=True, detokenize=False
    )
    for number, ids in enumerate(PROMPTS):
        core.add_request(str(number), {"prompt_token_ids": ids}, params)
    while core.has_unfinished_requests():
        for output in core.step():
            answers[output.request_id] = list(output.outputs[0].token_ids)
        steps -= 1
        if not steps:
            replace(llm, folder)
    assert steps < 0
    return [answers[str(number)] for number in range(len(PROMPTS))]


@pytest.mark.parametrize(
    "eager", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["eager", ""]
)
def test_another_drafter_drafts_at_once(
    eager: bool,
    tiny_targets: dict[str, Path],
    tiny_drafter: Drafter,
    tmp_path: Path,
) -> None:
    """As in an engine that was started with it; requests under way go on."""
    good = tiny_drafter("llama", "mixed")
    other = changed(good, tmp_path / "other")
    target, settings = tiny_targets["llama"], {"enforce_eager": eager}
    with engine(target, spec_for(other), **settings) as llm:
        expected = generate(llm, PROMPTS, LENGTH)
    with engine(target, spec_for(good), **settings) as llm:
        before = generate(llm, PROMPTS, LENGTH)
        in_between = replaced_after(4, llm, other)
        after = generate(llm, PROMPTS, LENGTH)
        replace(llm, good)
        again = generate(llm, PROMPTS, LENGTH)
    assert before.token_ids == after.token_ids == expected.token_ids == in_between
    assert before.counts != expected.counts
    assert after.counts == expected.counts
    assert again.counts == before.counts


def test_a_drafter_that_failed_can_be_replaced(
    tiny_targets: dict[str, Path], tiny_drafter: Drafter
) -> None:
    good = tiny_drafter("llama", "shared-4")
    with engine(tiny_targets["llama"], spec_for(good)) as llm:
        before = generate(llm, PROMPTS, LENGTH)
        for _ in range(MAX_FAILURES):
            drafter_of(llm).faults.survive(ValueError("a fault"))
        off = generate(llm, PROMPTS, LENGTH)
        replace(llm, good)
        again = generate(llm, PROMPTS, LENGTH)
    assert off.counts.accepted_tokens == 0
    assert again.counts == before.counts


def test_what_cannot_replace_a_drafter_leaves_it_as_it_is(
    tiny_targets: dict[str, Path],
    tiny_drafter: Drafter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = tiny_drafter("llama", "shared-4")
    refused = {
        tmp_path / "nothing": "no such folder",
        tiny_drafter("llama", "shared-1"): "num_speculative_tokens: got 1, expected 4",
        tiny_drafter("llama", "overflows"): "layers: got",
        tiny_drafter("qwen3", "shared-4"): "this drafter does not fit the target",
    }
    with engine(tiny_targets["llama"], spec_for(good)) as llm:
        before = generate(llm, PROMPTS, LENGTH)
        for folder, message in refused.items():
            assert message in refusal(llm, folder)
        # As if another rank could not read it.
        monkeypatch.setattr(loading, "_on_all_ranks", lambda good: False)
        assert "another rank" in refusal(llm, changed(good, tmp_path / "new"))
        assert generate(llm, PROMPTS, LENGTH).counts == before.counts


def test_rows_of_the_head_follow_the_target(
    tiny_targets: dict[str, Path], tiny_drafter: Drafter, tmp_path: Path
) -> None:
    """A reduced vocabulary has a copy of them, which vLLM does not know of."""
    target = tmp_path / "target"
    target.mkdir()
    for file in tiny_targets["llama"].iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    # Another order of the tokens: then the drafter's rows are far from right.
    weights["lm_head.weight"] = weights["lm_head.weight"].roll(1, dims=0).contiguous()
    spec = spec_for(tiny_drafter("llama", "mixed"))
    with engine(tiny_targets["llama"], spec) as llm:
        first = generate(llm, PROMPTS, LENGTH)
        save_file(weights, target / "model.safetensors", {"format": "pt"})
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(target)})
        llm.reset_prefix_cache()
        run = generate(llm, PROMPTS, LENGTH)
        bound = bound_drafter_of(llm)
        rows = torch.randn(5, bound.drafter.config.target.hidden_size)
        whole = bound.target.logits(rows)[:, bound.drafter.draft_vocab.token_ids]
        torch.testing.assert_close(bound.small_head(rows), whole, atol=1e-2, rtol=1e-2)
    with engine(target, spec) as llm:
        fresh = generate(llm, PROMPTS, LENGTH)
    assert run.token_ids == fresh.token_ids != first.token_ids
    assert run.counts == fresh.counts


def test_what_vllm_sees_as_draft_model(
    tiny_targets: dict[str, Path], tiny_drafter: Drafter
) -> None:
    """For sleep mode, which needs a GPU: all that is ours and nothing of the target's.
    Not for vLLM's own way to load draft weights."""
    asleep = SimpleNamespace(enable_sleep_mode=True, sleep_preserve_parameter_names=[])
    awake = SimpleNamespace(enable_sleep_mode=False, sleep_preserve_parameter_names=[])
    for model in (asleep, asleep, awake):
        keep_drafter_asleep(model)
    assert asleep.sleep_preserve_parameter_names == ["draft.*"]
    assert awake.sleep_preserve_parameter_names == []
    spec = spec_for(tiny_drafter("llama", "mixed"))
    with engine(tiny_targets["llama"], spec) as llm:
        runner, bound = runner_of(llm), bound_drafter_of(llm)
        before = generate(llm, PROMPTS, LENGTH)
        shown = runner.get_draft_model()
        parameters = {id(parameter) for parameter in shown.parameters()}
        ours = [*bound.drafter.parameters(), bound.small_head.weight]
        assert parameters == set(map(id, ours))
        assert parameters.isdisjoint(map(id, runner.get_model().parameters()))
        assert [id(b) for b in shown.buffers()] == [
            id(b) for b in bound.drafter.buffers()
        ]
        initialize_layerwise_reload(shown)
        with pytest.raises(MTPError, match="replace_drafter"):
            shown.load_weights([])
        runner.reset_lora_state()  # which newer vLLM shows it to
        assert generate(llm, PROMPTS, LENGTH).counts == before.counts
        if ON_V2:
            runner.shutdown()
