# SPDX-License-Identifier: Apache-2.0
"""Start vLLM in this process, and look at what it did."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# In one process, so that a test can look into the runner. Before vLLM is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# Which cores there are, and which of them are free, differs from machine to machine.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Asks the machine for its facts, in a process of its own for each engine.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.platforms.cpu import CpuPlatform

from vllm_mtp.drafter.checkpoint import read_config
from vllm_mtp.engine import bound_drafter_of as bound_drafter_of  # for the tests
from vllm_mtp.engine import core_of, runner_of, start
from vllm_mtp.installed import installed_folder
from vllm_mtp.metrics import AcceptanceCounts, read_vllm_counters
from vllm_mtp.plugin import METHOD

# Set by `triton_interpreter/sitecustomize.py`, see test_v2.py.
ON_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"


def cannot_here(settings: Mapping[str, Any], target: str = "") -> str | None:
    """Why this machine cannot run an engine of these settings on a target, if so."""
    if "w8a8" in target and torch.cpu._is_amx_tile_supported():
        return "vLLM's 8-bit kernel for AMX takes no float32"
    if str(settings.get("kv_cache_dtype", "")).startswith("fp8"):
        # `_get_attn_isa` in vllm/v1/attention/backends/cpu_attn.py.
        if torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported():
            return None
        return "vLLM's fp8 KV cache on CPUs needs AVX-512 or AMX"
    return None


SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "block_size": 32,
    "disable_log_stats": False,
    "seed": 0,
    # vLLM fills all of it with zeros; a tiny target's 256 tokens take half a MiB.
    "kv_cache_memory_bytes": 64 << 20,
}


@dataclass(frozen=True)
class Run:
    """What one call of `generate` gave."""

    token_ids: list[list[int]]
    logprobs: list[Any]
    counts: AcceptanceCounts
    prefix_hits: int  # tokens found in the prefix cache
    preemptions: int
    chunked: int  # steps that left a prompt unfinished
    mixed: int  # steps with both prompts and decoding
    largest: int  # requests in the largest step


@contextmanager
def engine(
    target: str | os.PathLike[str], spec: dict[str, Any] | None = None, **settings: Any
) -> Iterator[LLM]:
    """One vLLM engine, gone when the block ends."""
    if not Path(target, "tokenizer.json").exists():
        settings["skip_tokenizer_init"] = True  # a tiny target made in code
    spec = spec and with_fixed_length(spec)
    settings = SETTINGS | settings | {"speculative_config": spec}
    gc.collect()
    gc.freeze()
    with ExitStack() as stack:
        with _quick_start(settings.pop("kv_cache_memory_bytes")):
            llm = stack.enter_context(start(target, **settings))
        if ON_V2:
            is_v2 = of_each_runner(llm, lambda runner: hasattr(runner, "speculator"))
            assert all(is_v2), "not the V2 runner"
        yield llm
        with _without_collections():
            stack.close()
    del llm
    gc.collect()  # only of what came since `gc.freeze`


def with_fixed_length(spec: dict[str, Any]) -> dict[str, Any]:
    """All tokens that a drafter was made for in each step, so that what is accepted
    does not hang on how fast a tiny target happens to be. A spec that says None leaves
    the length to us."""
    if spec.get("method") != METHOD or _LENGTHS & spec.keys():
        return dict(spec)
    folder = spec.get("model") or installed_folder("cheap")  # which the target finds
    made_for = read_config(Path(folder)).num_speculative_tokens
    return spec | {"num_speculative_tokens": made_for}


_LENGTHS = {"num_speculative_tokens", "num_speculative_tokens_per_batch_size"}


@contextmanager
def _without_collections() -> Iterator[pytest.MonkeyPatch]:
    """vLLM looks for garbage eight times from start to shutdown, everywhere: two thirds
    of the time that an engine with a tiny target takes."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("collect", "freeze", "unfreeze"):
            patch.setattr(gc, name, lambda *_: 0)
        yield patch


@contextmanager
def _quick_start(cache_bytes: int) -> Iterator[None]:
    """Without what vLLM need not do again for each engine of a process, and with a
    cache of less than a GiB, the least that the environment can say."""
    check = CpuPlatform.check_and_update_config

    def with_small_cache(config: Any) -> None:
        check(config)
        config.cache_config.kv_cache_memory_bytes = cache_bytes

    with _without_collections() as patch:
        patch.setattr(
            CpuPlatform, "check_and_update_config", staticmethod(with_small_cache)
        )
        register = getattr(CpuPlatform, _ONCE, None)
        if register is not None and _registered:
            patch.setattr(CpuPlatform, _ONCE, classmethod(lambda _: None))
        yield
    _registered.add(_ONCE)


# It searches every module for the kernels that it stands in for, and wraps them.
_ONCE = "register_triton_kernel_overrides"
_registered: set[str] = set()


def generate(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    max_tokens: int = 40,
    lora_request: Any = None,
    **sampling: Any,
) -> Run:
    """Answer prompts of token ids, greedily unless told otherwise."""
    params = SamplingParams(
        **{
            "temperature": 0.0,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "detokenize": False,
            "logprobs": 5,
        }
        | sampling
    )
    before = counters(llm)
    with watched_steps(llm) as steps:
        outputs = llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts],
            params,
            use_tqdm=False,
            lora_request=lora_request,
        )
    after = counters(llm)
    return Run(
        [list(output.outputs[0].token_ids) for output in outputs],
        [output.outputs[0].logprobs for output in outputs],
        after[0] - before[0],
        after[1] - before[1],
        after[2] - before[2],
        sum(step.chunked for step in steps),
        sum(step.prompts > 0 and step.decoding > 0 for step in steps),
        max(step.prompts + step.decoding for step in steps),
    )


@dataclass(frozen=True)
class _Step:
    prompts: int  # requests that compute prompt tokens
    decoding: int
    chunked: bool


@contextmanager
def watched_steps(llm: LLM) -> Iterator[list[_Step]]:
    """What vLLM's scheduler put into each step."""
    scheduler = core_of(llm).scheduler
    schedule, steps = scheduler.schedule, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        rows = [
            (scheduler.requests[name].num_prompt_tokens, computed - new, computed)
            for name, new in output.num_scheduled_tokens.items()
            if (computed := scheduler.requests[name].num_computed_tokens)
        ]
        if rows:
            prompts = [row for row in rows if row[1] < row[0]]
            chunked = any(end < length for length, _, end in prompts)
            steps.append(_Step(len(prompts), len(rows) - len(prompts), chunked))
        return output

    scheduler.schedule = watched
    try:
        yield steps
    finally:
        scheduler.schedule = schedule


def counters(llm: LLM) -> tuple[AcceptanceCounts, int, int]:
    metrics = llm.get_metrics()

    def total(name: str) -> int:
        return sum(int(m.value) for m in metrics if m.name == name)

    return (
        read_vllm_counters(metrics),
        total("vllm:prefix_cache_hits"),
        total("vllm:num_preemptions"),
    )


def of_each_runner(llm: LLM, question: Callable[[Any], Any]) -> list[Any]:
    """Ask the model runner of every rank, also in other processes."""
    return llm.collective_rpc(lambda worker: question(worker.model_runner))


def num_kv_blocks(llm: LLM) -> int:
    return llm.llm_engine.vllm_config.cache_config.num_gpu_blocks


def kv_block_sizes(llm: LLM) -> tuple[int, ...]:
    """Tokens per block of every KV-cache group, ascending."""
    groups = runner_of(llm).kv_cache_config.kv_cache_groups
    return tuple(sorted(group.kv_cache_spec.block_size for group in groups))
