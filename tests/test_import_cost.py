# SPDX-License-Identifier: Apache-2.0
"""What importing costs: vLLM imports the plugin in every process, ours or not."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_mtp

PACKAGE = Path(vllm_mtp.__file__).parent
HEAVY = {"torch", "transformers", "vllm", "pydantic", "safetensors", "numpy"}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def _loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after ``statement``."""
    code = f"{statement}; import sys; print(*{{n.split('.')[0] for n in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "module", ["vllm_mtp", "vllm_mtp.plugin", "vllm_mtp.engine", "vllm_mtp.installed"]
)
def test_importing_the_plugin_is_cheap(module: str) -> None:
    loaded = _loaded_by(f"import {module}")
    assert "vllm_mtp" in loaded
    assert loaded & HEAVY == set()


def test_the_drafter_in_torch_does_not_load_vllm() -> None:
    """By no detour either: training must run where vLLM is not installed."""
    loaded = _loaded_by(
        "import vllm_mtp.drafter.checkpoint, vllm_mtp.metrics, "
        "vllm_mtp.torch_host.new_drafter, vllm_mtp.torch_host.hf_target"
    )
    assert {"torch", "transformers"} <= loaded
    assert "vllm" not in loaded


def _imported(source: str) -> set[str]:
    """Modules that a source imports anywhere, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and node.args:
            # importlib.import_module("vllm...") with the name spelled out.
            function, first = ast.unparse(node.func), node.args[0]
            if function.endswith("import_module") and isinstance(first, ast.Constant):
                names.add(str(first.value))
    return names


def _of_vllm(source: str) -> set[str]:
    return {name for name in _imported(source) if name.partition(".")[0] == "vllm"}


@pytest.mark.parametrize(
    "source",
    [
        "import vllm",
        "import os, vllm.config",
        "from vllm.config import VllmConfig",
        "def f():\n    from vllm import LLM",
        "import importlib\nimportlib.import_module('vllm.v1')",
    ],
)
def test_scanner_sees_every_kind_of_import(source: str) -> None:
    assert _of_vllm(source)


@pytest.mark.parametrize(
    "source", ["import vllm_mtp", "from . import vllm", "x = 'import vllm'"]
)
def test_scanner_sees_nothing_else(source: str) -> None:
    assert not _of_vllm(source)


def test_only_serving_and_the_engine_import_vllm() -> None:
    """`serving` is what vLLM loads, and `engine` is how we use vLLM."""
    importers = {
        source.relative_to(PACKAGE).parts[0]
        for source in SOURCES
        if _of_vllm(source.read_text("utf-8"))
    }
    assert importers == {"serving", "engine.py"}


def test_every_public_name_can_be_had() -> None:
    for name in vllm_mtp.__all__:
        assert getattr(vllm_mtp, name).__name__ == name


def test_other_names_cannot() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vllm_mtp.nothing
