# SPDX-License-Identifier: Apache-2.0
"""Settings from flags and YAML."""

from pathlib import Path

import pytest

from vllm_mtp.cli import _load
from vllm_mtp.errors import MTPError

EXAMPLES = sorted(
    file
    for file in (Path(__file__).parents[2] / "examples").rglob("*.yaml")
    if file.name != "rows.yaml"
)
NEEDED = ["--target", "t", "--data", "d", "--use_cpu", "true"]


def load(*flags: str):  # type: ignore[no-untyped-def]
    return _load("train", [*flags, *NEEDED])


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_settings_are_valid(file: Path) -> None:
    args = load(str(file))
    assert args.plan().objective.place_weights(4).sum() == pytest.approx(1.0)


def test_there_are_examples() -> None:
    assert {file.stem for file in EXAMPLES} >= {"shared", "cheap", "base", "demo"}


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("layers: own:0\nlearning_rate: 0.5\nlora_modules: [q_proj, k_proj]")
    args = load(str(file), "--learning_rate", "0.25")
    assert (args.layers, args.learning_rate) == ("own:0", 0.25)
    assert args.lora_modules == ["q_proj", "k_proj"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'.*did you mean 'learning_rate'"),
        ("- 1", "expected `key: value` lines"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(MTPError, match=f"run.yaml: .*{reason}"):
        load(str(file))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MTPError, match="no such file"):
        load(str(tmp_path / "none.yaml"))


def test_target_and_data_are_needed() -> None:
    with pytest.raises(MTPError, match="both are needed"):
        _load("train", ["--target", "t"])


def test_new_places_need_a_start() -> None:
    with pytest.raises(MTPError, match="needs warm_start"):
        load("--train_only", "new_places")
