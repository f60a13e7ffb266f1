# SPDX-License-Identifier: Apache-2.0
"""A target that is divided over devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_targets import make_tiny
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.torch_host.load import load_frozen


def test_a_divided_target_trains_as_a_whole_one(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """States, losses and gradients; in a process that has fake devices."""
    sinks = make_tiny("gpt_oss", tmp_path / "gpt_oss")
    tied = make_tiny("gemma2", tmp_path / "gemma2")
    cases = [
        f"{tiny_llama}=shared:0-2,own:3,2",
        f"{tiny_llama}=shared:all",
        f"{sinks}=shared:0,own:2,3",
        f"{tied}=shared:0,own:2,3",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.torch_host.divided", *cases],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("tensors are the same") == len(cases)


def test_a_target_that_no_gpu_has_room_for_is_refused(
    tiny_llama: Path,
) -> None:
    """accelerate would leave the rest in the memory of the CPU, or on disk."""
    full = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(UnsupportedTargetError) as why:
        load_frozen(tiny_llama, "float32", "cpu", full)
    assert "2 of its parts, such as model, have no room on the GPUs" in str(why.value)
    assert "\n" not in str(why.value)


def test_where_one_device_is_enough_nothing_is_divided(tiny_llama: Path) -> None:
    model = load_frozen(tiny_llama, "float32", "cpu", "balanced_low_0")
    assert {str(weight.device) for weight in model.parameters()} == {"cpu"}
