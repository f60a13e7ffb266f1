# SPDX-License-Identifier: Apache-2.0
"""The V2 model runner, without a GPU.

The runner needs Triton, which must be talked into its interpreter before vLLM is
imported: so a second pytest runs the same tests in a process of its own, with fewer
and shorter requests. By hand, one file of them:

    PYTHONPATH=tests/serving/triton_interpreter VLLM_USE_V2_MODEL_RUNNER=1 \
        TORCHDYNAMO_DISABLE=1 pytest tests/serving/test_faults.py
"""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.nested_pytest import run_pytest

HERE = Path(__file__).parent
EVERY_RUN = "not slow and not matrix"
SECONDS = 1500

# name: (files, what of them), in every run
RUNS: dict[str, tuple[Sequence[str], str]] = {
    "matrix": (("test_matrix.py", "test_stateless.py"), EVERY_RUN),
    "other": (
        (
            *("test_parity.py", "test_host_syncs.py", "test_faults.py"),
            *(
                "test_draft_files.py",
                "test_requests.py",
                "test_seeds.py",
                "test_connectors.py",
                "test_adapters.py",
                "test_replacing.py",
                "v2_cases.py",
            ),
        ),
        EVERY_RUN,
    ),
    "families": (("test_families.py",), EVERY_RUN),
}
SLOW_RUNS: dict[str, tuple[Sequence[str], str]] = {
    "tensor-parallel": (("test_tensor_parallel.py",), EVERY_RUN),
    "slow": (
        ("test_parity.py", "test_host_syncs.py", "test_faults.py", "v2_cases.py"),
        "slow",
    ),
    "slow-families": (("test_families.py",), "slow"),
    "slow-others": (
        ("test_async.py", "test_distribution.py", "test_over_budget.py"),
        EVERY_RUN,
    ),
}
WHOLE_MATRIX = (("test_matrix.py",), "matrix")

pytestmark = [pytest.mark.engine, pytest.mark.timeout(SECONDS + 60)]


def environment() -> dict[str, str]:
    path = [str(HERE / "triton_interpreter"), os.environ.get("PYTHONPATH", "")]
    # The variable is set here too: `engine` fails where the runner is not V2.
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        # vLLM compiles a part of a sharded embedding, and the compiler would ask
        # the interpreter for its device.
        "TORCHDYNAMO_DISABLE": "1",
    }


def require_passed(
    names: Sequence[str], which: str, folder: Path, limit: float = SECONDS
) -> None:
    files = [str(HERE / name) for name in names]
    report = run_pytest(["-m", which, *files], environment(), folder, limit)
    if not report.is_good:
        pytest.fail(str(report), pytrace=False)
    print(report)


@pytest.mark.parametrize("name", RUNS)
def test_the_same_tests_pass_on_v2(name: str, tmp_path: Path) -> None:
    require_passed(*RUNS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_RUNS)
def test_slow_ones_pass_on_v2(name: str, tmp_path: Path) -> None:
    require_passed(*SLOW_RUNS[name], tmp_path)


@pytest.mark.matrix
@pytest.mark.timeout(7260)
def test_the_whole_matrix_on_v2(tmp_path: Path) -> None:
    require_passed(*WHOLE_MATRIX, tmp_path, 7200)
