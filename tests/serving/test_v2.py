# SPDX-License-Identifier: Apache-2.0
"""The V2 model runner, without a GPU.

The runner needs Triton, which must be talked into its interpreter before vLLM is
imported: so a second pytest runs the same tests in a process of its own, with fewer
and shorter requests.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

HERE = Path(__file__).parent
OTHERS = (
    *("test_parity.py", "test_host_syncs.py", "test_faults.py"),
    *("test_requests.py", "test_seeds.py", "v2_cases.py"),
)
LOSSLESS = ("test_lossless.py", "test_stateless.py")


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("names", "which"),
    [
        (["test_exact.py"], "not slow"),
        (OTHERS, "not slow"),
        (["test_families.py"], "not slow"),
        (LOSSLESS, "not slow"),
        pytest.param(["test_tensor_parallel.py"], "not slow", marks=pytest.mark.slow),
        pytest.param(
            ["test_families.py", "test_faults.py"], "slow", marks=pytest.mark.slow
        ),
        pytest.param(
            ["test_async.py", "test_distribution.py"],
            "not slow",
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        *("exact", "other", "families", "lossless"),
        *("tensor-parallel", "slow-families", "slow-others"),
    ],
)
def test_the_same_tests_pass_on_v2(names: Sequence[str], which: str) -> None:
    path = [str(HERE / "triton_interpreter"), os.environ.get("PYTHONPATH", "")]
    files = [str(HERE / name) for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", which, *files],
        # The variable is set here too: `engine` fails where the runner is not V2.
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "VLLM_USE_V2_MODEL_RUNNER": "1",
            # vLLM compiles a part of a sharded embedding, and the compiler would ask
            # the interpreter for its device.
            "TORCHDYNAMO_DISABLE": "1",
        },
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert "passed" in summary
    print(summary)
