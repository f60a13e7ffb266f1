# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several folders use, and a core for each of several workers."""

import os
from pathlib import Path

# `pytest -n 2`: two files at a time, each with one core, as most of a test's time is
# one thread's. Before torch and vLLM are imported; their subprocesses get it as well.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(worker.removeprefix("gw")) % len(cores)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))

import pytest
from hypothesis import settings

from tests.tiny_targets import make_tiny

# The first example pays for imports and caches; a busy machine is no failure.
settings.register_profile("vllm-mtp", deadline=None)
settings.load_profile("vllm-mtp")

pytest_plugins = ["tests.servers", "tests.tiny_answers"]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("targets") / "llama")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("targets") / "qwen3")
