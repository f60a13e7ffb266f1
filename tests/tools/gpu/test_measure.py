# SPDX-License-Identifier: Apache-2.0
"""The GPU measurement's dry run: every side on tiny shapes.

pytest -m slow tests/tools/gpu
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(1200)
def test_the_dry_run_measures_every_side(tmp_path: Path) -> None:
    command = [sys.executable, "tools/gpu/measure.py", "all", "--dry-run"]
    command += ["--dtype", "float32"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "failed" not in (tmp_path / "cost.md").read_text("utf-8")
    assert "shared:all" in (tmp_path / "answers.md").read_text("utf-8")
