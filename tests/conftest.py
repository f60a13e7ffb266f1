# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several folders use."""

from pathlib import Path

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
