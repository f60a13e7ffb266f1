# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several folders use, and how tests run side by side.

`make test` runs two tests at a time (`pytest -n 2 --dist loadscope`), each in a process
that has its part of the cores.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

# Before torch is imported: more threads than cores wait for each other.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    cores = max(1, len(os.sched_getaffinity(0)) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(cores))

import pytest
from hypothesis import settings

from tests.tiny_targets import make_tiny

# The first example pays for imports and caches; a busy machine is no failure.
settings.register_profile("vllm-mtp", deadline=None)
settings.load_profile("vllm-mtp")

pytest_plugins = ["tests.servers", "tests.tiny_answers"]

# Tests of a group run one after the other in one process, for what they share; a file
# is a group, but for these. The longest come first, so that none is left for the end.
LONG_FIRST = (
    "test_families",
    "v2-other",
    "v2-matrix",
    "matrix-smollm2",
    "matrix-llama",
    "matrix",
    "test_soak",
    "test_faults",
    "test_parity",
    "server",
)
WITH_SERVER = ("test_serve.py", "test_examples.py")


def group_of(nodeid: str) -> str:
    """What a test runs together with, where several processes run tests."""
    file, _, test = nodeid.partition("::")
    name, case = Path(file).name, test.partition("[")[2].rstrip("]")
    if name == "test_v2.py" and case:
        return f"v2-{case}"
    if name == "test_matrix.py" and case:
        family = case.partition("-")[0]
        return f"matrix-{family}" if family in ("llama", "smollm2") else "matrix"
    if name in WITH_SERVER:
        return "server"
    return name.removesuffix(".py")


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be missing
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out whole groups.

    pytest-xdist's own ``loadgroup`` writes a group into the test's id, which pytest 9.2
    does not let it.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """In a process beside others, the longest groups come first."""
    if hasattr(config, "workerinput"):
        order = {name: place for place, name in enumerate(LONG_FIRST)}
        items.sort(key=lambda item: order.get(group_of(item.nodeid), len(order)))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("targets") / "llama")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("targets") / "qwen3")


@pytest.fixture(autouse=True)
def _vllm_logs_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM logs to the stream that it found when it was imported: in some earlier test
    of the process, whose captured output is closed."""
    for handler in logging.getLogger("vllm").handlers:
        if type(handler) is logging.StreamHandler:  # and not pytest's own
            monkeypatch.setattr(handler, "stream", sys.__stderr__)
