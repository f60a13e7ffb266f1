# SPDX-License-Identifier: Apache-2.0
"""Replicas of a target: two of a dense one, served, answer as the target alone.

Three processes more than usual start one after the other, so
``pytest -m slow tests/serving/test_data_parallel.py`` runs it. Of a mixture of experts
vLLM runs no replicas on a CPU, with or without the method: there, a draft must not wait
for anybody, which is looked at in one process.
"""

import copy
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.servers import flags_of, start_server
from tests.serving.engines import ON_V2, engine, generate
from tests.tiny_targets import make_tiny
from tests.tiny_tokenizer import save_tiny_tokenizer
from vllm_mtp.bench.servers import Server, kill_server
from vllm_mtp.engine import drafter_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 128}
PROMPTS = [[(37 * i + 11 * n) % 512 for i in range(n)] for n in range(2, 34)]
MAX_TOKENS = 16


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny("llama", tmp_path_factory.mktemp("dp") / "llama")
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def replicas(
    target: Path,
    tiny_drafter: Callable[[str, str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    spec = {
        "method": "mtp_placeholder",
        "model": str(tiny_drafter("llama", "shared-4")),
    }
    flags = flags_of(SETTINGS)
    flags += ["--speculative-config", json.dumps(spec), "--data-parallel-size", "2"]
    folder = tmp_path_factory.mktemp("replicas")
    server = start_server(target, folder, [*flags, "--enforce-eager"])
    try:
        yield server
    finally:
        kill_server(server)


def test_a_draft_of_own_layers_waits_for_no_other_replica(
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replicas of a mixture of experts tell each other how many rows they run, and then
    wait for each other's in every layer with experts."""
    spec = {"model": str(tiny_drafter("qwen3_moe", "own-random"))}
    spec |= {"method": "mtp_placeholder"}
    with engine(tiny_targets["qwen3_moe"], spec) as llm:
        alone = generate(llm, PROMPTS[:4], MAX_TOKENS)
        host, drafts = drafter_of(llm)._host, drafter_of(llm)
        # The drafter alone believes in another replica.
        config = copy.copy(host._vllm_config)
        config.parallel_config = copy.copy(config.parallel_config)
        config.parallel_config.data_parallel_size = 2
        host._vllm_config = config
        assert config.parallel_config.is_moe_model
        told: list[object] = []
        monkeypatch.setattr(
            "vllm.forward_context.coordinate_batch_across_dp",
            lambda **rows: told.append(rows),
        )
        run = generate(llm, PROMPTS[:4], MAX_TOKENS)
        if not ON_V2:
            drafts.dummy_run(1)  # what a replica without requests does
    assert run.token_ids == alone.token_ids
    assert run.counts == alone.counts
    assert run.counts.drafts > 10
    assert not told


@pytest.mark.slow
def test_both_replicas_draft_and_answer_as_the_target(
    replicas: Server, target: Path
) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda p: ask(replicas, target, p), PROMPTS))
    with engine(target, **SETTINGS) as llm:
        expected = generate(llm, PROMPTS, MAX_TOKENS, logprobs=None)
    assert answers == expected.token_ids
    drafts = replicas.per_engine("spec_decode_num_drafts_total")
    assert set(drafts) == {"0", "1"}
    assert all(drafts.values())
    counts = replicas.acceptance()
    assert counts.drafts == sum(drafts.values())
    # The whole target drafts, so its first draft is right.
    assert counts.acceptance_per_position[0] > 0.9


def ask(server: Server, target: Path, prompt: list[int]) -> list[int]:
    body = {
        "model": str(target),
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    answer.raise_for_status()
    (choice,) = answer.json()["choices"]
    token_ids: list[int] = choice["token_ids"]
    return token_ids
