# SPDX-License-Identifier: Apache-2.0
"""Answers that were sampled otherwise than the target is served."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vllm_mtp import engine
from vllm_mtp.data.served_sampling import (
    difference_from_served,
    penalties_of,
    sampling_defaults,
)
from vllm_mtp.data.settings import SamplingSettings


@pytest.fixture
def target(chat_target: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    shutil.copytree(chat_target, folder)
    return folder


def write(target: Path, **values: Any) -> None:
    (target / "generation_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.7, "top_k": 20, "do_sample": False},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "min_p": 0.05},  # HF's own
        {"repetition_penalty": 1.3, "eos_token_id": [1, 2]},
    ],
)
def test_the_defaults_are_vllms(target: Path, values: dict[str, Any]) -> None:
    pytest.importorskip("vllm")
    write(target, **values)
    assert sampling_defaults(target) == engine.front_end(target).sampling_defaults()


def test_only_what_differs_is_said(target: Path) -> None:
    write(target, temperature=0.7, repetition_penalty=1.3)
    same = SamplingSettings(temperature=0.7, repetition_penalty=1.3, top_k=5)
    assert difference_from_served(same, target) is None
    said = difference_from_served(SamplingSettings(presence_penalty=1), target)
    assert said is not None
    assert "temperature 0.0 (served: 0.7), repetition_penalty 1.0 (served: 1.3)" in said
    assert "presence_penalty 1.0 (served: 0.0)" in said
    # Greedy decoding ignores what only filters, on either side.
    write(target, temperature=0.7, top_p=0.9)
    said = difference_from_served(SamplingSettings(top_k=5), target)
    assert said is not None
    assert "temperature 0.0 (served: 0.7):" in said
    write(target, top_p=0.9)
    said = difference_from_served(SamplingSettings(), target)
    assert said is not None
    assert "temperature 0.0 (served: 1.0):" in said
    (target / "generation_config.json").write_text("{")
    assert difference_from_served(SamplingSettings(), target) is None


def test_penalties_in_use() -> None:
    assert penalties_of(SamplingSettings(temperature=1, top_p=0.5)) == {}
    used = SamplingSettings(repetition_penalty=1.1, frequency_penalty=-1)
    assert penalties_of(used) == {"repetition_penalty": 1.1, "frequency_penalty": -1}
