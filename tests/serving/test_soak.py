# SPDX-License-Identifier: Apache-2.0
"""A server under mixed load for a while: every greedy answer is the target's, and
nothing is left behind.

About a minute in every run. Half an hour, and ten minutes more with LoRA adapters on
the target and a KV connector:

    pytest -m slow -s tests/serving/test_soak.py

Any other time, in seconds: ``VLLM_MTP_SOAK_SECONDS=180 pytest -s
tests/serving/test_soak.py``. ``-s`` shows the figures.

Requests have no seeds: on a CPU, vLLM's V1 runner dies of a seeded request whose prompt
is computed in pieces ("CPU Generator does not use offset"), without this method too.
"""

import asyncio
import json
import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from tests.servers import flags_of, start_server
from tests.serving import memory_offload
from tests.serving.engines import engine, generate
from tests.serving.soak import (
    CONCURRENCY,
    MAX_MODEL_LEN,
    Figures,
    GreedyAnswer,
    Soak,
)
from tests.serving.test_adapters import EVERYWHERE, save_adapter
from tests.tiny_targets import make_tiny
from tests.tiny_tokenizer import save_tiny_tokenizer
from vllm_mtp.bench.servers import Server, kill_server
from vllm_mtp.metrics import AcceptanceCounts

pytestmark = pytest.mark.engine

SECONDS = int(os.environ.get("VLLM_MTP_SOAK_SECONDS", "45"))
# Of the resident memory of all the server's processes together, from the second third
# of the time to the last. A short run ends while vLLM's own caches still fill.
MEMORY_MARGIN, SHORT_MEMORY_MARGIN, SHORT_SECONDS = 0.03, 0.06, 120
BLOCK_SIZE = 32
# A request at the limit needs 8 blocks of 32 tokens; 16 such do not fit by far.
NUM_BLOCKS = 41
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": CONCURRENCY,
    "max_num_batched_tokens": 128,  # long prompts come in pieces
    "block_size": BLOCK_SIZE,
    "num_gpu_blocks_override": NUM_BLOCKS,
    "seed": 0,
}

# One slot more than adapters: see docs/upstream/README.md.
OF_ADAPTERS = {"max_loras": 3, "max_lora_rank": 8}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = make_tiny("llama", tmp_path / "llama")
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture
def adapters(target: Path, tmp_path: Path) -> dict[str, LoRARequest]:
    modules = {"all": EVERYWHERE, "attention": ["q_proj", "v_proj"]}
    found = {}
    for number, (name, which) in enumerate(modules.items(), start=1):
        save_adapter(target, tmp_path / name, which, seed=number)
        found[name] = LoRARequest(name, number, str(tmp_path / name))
    return found


@pytest.fixture
def more(adapters: dict[str, LoRARequest], request: pytest.FixtureRequest) -> bool:
    """Whether the server has adapters and a connector."""
    return bool(request.param)


@pytest.fixture
def busy_server(
    target: Path,
    tiny_drafter: Callable[[str, str], Path],
    tmp_path: Path,
    adapters: dict[str, LoRARequest],
    more: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Server]:
    """With drafts that are sampled, of which the first is as good as the target's."""
    spec = {
        "method": "mtp_placeholder",
        "model": str(tiny_drafter("llama", "shared-4")),
        "draft_sample_method": "probabilistic",
    }
    flags = flags_of(SETTINGS)
    if more:
        # Where the connector's copies come from.
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        flags += ["--kv-transfer-config", json.dumps(memory_offload.CONNECTOR)]
        flags += ["--enable-lora", *flags_of(OF_ADAPTERS), "--lora-modules"]
        flags += [f"{name}={lora.path}" for name, lora in adapters.items()]
    server = start_server(
        target,
        tmp_path,
        ["--speculative-config", json.dumps(spec), "--enforce-eager", *flags],
    )
    try:
        yield server
    finally:
        kill_server(server)


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("seconds", "more"),
    [
        (SECONDS, False),
        pytest.param(1800, False, marks=pytest.mark.slow),
        pytest.param(600, True, marks=pytest.mark.slow),
    ],
    indirect=["more"],
)
def test_mixed_load(
    seconds: int,
    more: bool,
    busy_server: Server,
    target: Path,
    adapters: dict[str, LoRARequest],
) -> None:
    soak = Soak(
        busy_server.url,
        str(target),
        busy_server.process.pid,
        list(adapters) if more else (),
    )
    figures = asyncio.run(soak.run(seconds))
    if figures.errors:
        print(*figures.errors[:40], sep="\n")
    assert not figures.errors, figures.errors[:5]
    require_idle(busy_server)
    counts = busy_server.acceptance()
    preemptions = busy_server.metric("num_preemptions_total")
    prefix_hits = busy_server.metric("prefix_cache_hits_total")
    compared = compare_greedy(figures.greedy, target, adapters if more else {})
    start, end = memory_of(figures)
    tell(figures, counts, compared)
    print(f"preemptions    {preemptions:.0f}, prefix hits {prefix_hits:.0f} tokens")
    if more:
        found = busy_server.metric("external_prefix_cache_hits_total")
        print(f"from offload   {found:.0f} tokens")
        assert found > 0
        asked = Counter(answer.adapter for answer in figures.greedy)
        print(f"adapters       {dict(asked)}")
        assert set(asked) == {None, *adapters}
    print(f"memory         {start:.1f} MiB, at the end {end:.1f}")
    assert counts.drafts > len(figures.greedy)
    assert 0 < counts.accepted_tokens < counts.draft_tokens
    assert preemptions > 0
    assert prefix_hits > 0
    assert figures.at_limit > 0
    assert set(figures.given_up) == {"stream closed", "disconnected"}
    margin = SHORT_MEMORY_MARGIN if seconds < SHORT_SECONDS else MEMORY_MARGIN
    assert end <= start * (1 + margin)
    require_quiet_log(busy_server)


def require_idle(server: Server) -> None:
    """No request is left, and no block of the cache is held."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    deadline = time.monotonic() + 30
    while any(values := [server.metric(name) for name in names]):
        assert time.monotonic() < deadline, dict(zip(names, values, strict=True))
        time.sleep(0.5)
    assert server.running


def require_quiet_log(server: Server) -> None:
    lines = server.log.read_text("utf-8", "replace").splitlines()
    bad = [x for x in lines if "ERROR" in x or "CRITICAL" in x or "Traceback" in x]
    assert not bad, bad[:5]


def compare_greedy(
    answers: list[GreedyAnswer], target: Path, adapters: dict[str, LoRARequest]
) -> int:
    """Against the target alone, each question once; returns the tokens compared."""
    longest: dict[Any, dict[tuple[int, ...], int]] = defaultdict(dict)
    for answer in answers:
        wanted = longest[answer.adapter, answer.settings]
        so_far = wanted.get(answer.prompt, 1)
        wanted[answer.prompt] = max(so_far, len(answer.token_ids))
    expected: dict[Any, list[int]] = {}
    roomy = SETTINGS | {"num_gpu_blocks_override": 400}
    if adapters:
        roomy |= {"enable_lora": True, **OF_ADAPTERS}
    with engine(target, **roomy) as llm:
        for (adapter, settings), wanted in longest.items():
            most = sorted(wanted.items(), key=lambda item: item[1])
            for prompt, length in most:
                run = generate(
                    llm,
                    [prompt],
                    length,
                    adapters[adapter] if adapter else None,
                    logprobs=None,
                    **dict(settings),
                )
                expected[adapter, settings, prompt] = run.token_ids[0]
    for answer in answers:
        whole = expected[answer.adapter, answer.settings, answer.prompt]
        assert list(answer.token_ids) == whole[: len(answer.token_ids)], answer
    return sum(len(answer.token_ids) for answer in answers)


def memory_of(figures: Figures) -> tuple[float, float]:
    """MiB in the second third of the time and in the last."""
    third = len(figures.memory) // 3
    assert third > 3
    warm, last = figures.memory[third : 2 * third], figures.memory[-third:]
    return statistics.median(warm), statistics.median(last)


def tell(figures: Figures, counts: AcceptanceCounts, compared: int) -> None:
    whole = sum(answer.whole for answer in figures.greedy)
    print(f"\nrequests       {figures.requests.total()}: {dict(figures.requests)}")
    print(f"given up       {dict(figures.given_up)}")
    print(f"at the limit   {figures.at_limit}")
    print(
        f"greedy         {whole} whole answers, {len(figures.greedy) - whole} "
        f"beginnings, {compared} tokens: all the target's"
    )
    print(
        f"drafts         {counts.drafts}, acceptance length "
        f"{counts.acceptance_length:.3f}, by position "
        f"{[round(rate, 3) for rate in counts.acceptance_per_position]}"
    )
