# SPDX-License-Identifier: Apache-2.0
"""The V2 model runner, without a GPU.

The runner needs Triton, which must be talked into its interpreter before vLLM is
imported: so a second pytest runs the same tests in a process of its own, with fewer
and shorter requests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

HERE = Path(__file__).parent


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "names",
    [
        ["test_exact.py"],
        ["test_parity.py", "test_host_syncs.py", "v2_cases.py"],
        pytest.param(["test_async.py", "test_distribution.py"], marks=pytest.mark.slow),
    ],
    ids=["exact", "other", "slow"],
)
def test_the_same_tests_pass_on_v2(names: list[str]) -> None:
    path = [str(HERE / "triton_interpreter"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *(str(HERE / n) for n in names)],
        # The variable is set here too: `engine` fails where the runner is not V2.
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "VLLM_USE_V2_MODEL_RUNNER": "1",
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
