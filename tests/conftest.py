# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several folders use, and how tests run side by side.

`make test` runs two tests at a time (`pytest -n 2 --dist loadgroup`), each in a process
that has its part of the cores.
"""

import os
from pathlib import Path

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


def group_of(item: pytest.Item) -> str:
    """What a test runs together with, where several processes run tests."""
    name = item.path.name
    case = getattr(item, "callspec", None)
    if name == "test_v2.py" and case:
        return f"v2-{case.params['name']}"
    if name == "test_matrix.py" and case:
        family = case.params["case"].family.partition("-")[0]
        return f"matrix-{family}" if family in ("llama", "smollm2") else "matrix"
    if name in WITH_SERVER:
        return "server"
    return item.path.stem


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Say what runs together, and in which order, in a process beside others."""
    if not hasattr(config, "workerinput"):
        return
    groups = {item: group_of(item) for item in items}
    order = {name: place for place, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: order.get(groups[item], len(order)))
    for item, name in groups.items():
        item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("targets") / "llama")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("targets") / "qwen3")
