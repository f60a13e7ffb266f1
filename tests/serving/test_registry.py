# SPDX-License-Identifier: Apache-2.0
"""vLLM with the registry of methods that we propose: nothing but repairs is patched.

A second pytest runs with the installed vLLM and the diff of docs/upstream/, which is
applied in another folder.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.nested_pytest import run_pytest
from tests.serving.patched_vllm import patched_vllm
from tests.serving.test_v2 import environment as v2_environment
from vllm_mtp.serving import versions

HERE = Path(__file__).parent
DIFF = HERE.parents[1] / "docs" / "upstream" / "plugin-methods.diff"
FITS = ("0.32.0", "0.33.0")
SECONDS = 600

pytestmark = [pytest.mark.engine, pytest.mark.timeout(SECONDS + 60)]


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = versions.installed()
    assert found is not None
    if found.release is None or found.release.version not in FITS:
        pytest.skip(f"the diff is made for vLLM {' and '.join(FITS)}")
    root = tmp_path_factory.mktemp("patched")
    patched_vllm(DIFF, root)
    return root


def require_passed(
    root: Path, environment: dict[str, str], tests: Sequence[str], folder: Path
) -> None:
    path = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
    report = run_pytest(tests, environment | {"PYTHONPATH": path}, folder, SECONDS)
    if not report.is_good:
        pytest.fail(str(report), pytrace=False)
    print(report)


def test_on_v1(patched: Path, tmp_path: Path) -> None:
    environment = os.environ | {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    # And the proposal's own tests.
    theirs = str(patched / "tests/v1/spec_decode/test_registry.py")
    cases = str(HERE / "registry_cases.py")
    require_passed(patched, environment, [cases, theirs], tmp_path)


@pytest.mark.slow
def test_on_v2(patched: Path, tmp_path: Path) -> None:
    cases = str(HERE / "registry_cases.py")
    require_passed(patched, v2_environment(), [cases], tmp_path)


@pytest.mark.slow
def test_in_processes_of_their_own(patched: Path, tmp_path: Path) -> None:
    tests = [str(HERE / "test_never_in_the_way.py"), "-m", "slow", "-k", "workers"]
    require_passed(patched, dict(os.environ), tests, tmp_path)
