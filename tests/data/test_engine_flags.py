# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp generate``'s flags for large targets, up to vLLM's offline engine."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import WriteJsonl
from tests.data.test_resume import arguments, rows
from vllm_mtp.cli.main import main
from vllm_mtp.data.store import read_provenance

pytest.importorskip("vllm")
pytest.importorskip("datasets")


class Started(Exception):
    """Instead of an engine."""


@pytest.fixture
def command(chat_target: Path, write_jsonl: WriteJsonl, tmp_path: Path) -> list[str]:
    prompts = write_jsonl([{"prompt": f"number {n}"} for n in range(6)])
    return arguments(chat_target, prompts, tmp_path / "out", 0.0)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the engine was asked to start with."""
    found: dict[str, Any] = {}

    @contextmanager
    def start(_: Path, **settings: Any) -> Iterator[None]:
        found.clear()
        found.update(settings)
        raise Started("no memory\n  left")
        yield

    monkeypatch.setattr("vllm_mtp.engine.start", start)
    return found


def test_the_flags_reach_the_engine(
    command: list[str], given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tensor-parallel-size", "2", "--gpu-memory-utilization", "0.5"]
    assert main([*command, *flags]) == 1
    assert (given["tensor_parallel_size"], given["gpu_memory_utilization"]) == (2, 0.5)
    assert given["quantization"] is None
    error = capsys.readouterr().err
    assert "vLLM starts no engine of it with --dtype float32" in error
    assert "--tensor-parallel-size 2" in error
    assert "(Started: no memory left)" in error
    assert error.count("\n") == 1
    # Left out, they are vLLM's, which knows the platform.
    assert main(command) == 1
    assert "gpu_memory_utilization" not in given


def test_another_machine_goes_on_but_not_with_another_quantization(
    command: list[str], given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The run in the folder was begun without any of them."""
    assert main(command) == 1
    assert main([*command, "--tensor-parallel-size", "2"]) == 1
    assert given["tensor_parallel_size"] == 2
    capsys.readouterr()
    assert main([*command, "--quantization", "fp8"]) == 1
    error = capsys.readouterr().err
    assert "engine.quantization: the folder has None, this run has 'fp8'" in error


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--tensor-parallel-size", "0", "got 0; input should be greater"),
        ("--tensor-parallel-size", "3", "heads (4) must be divisible"),
        ("--gpu-memory-utilization", "1.5", "got 1.5; input should be less"),
        ("--gpu-memory-utilization", "nan", "got nan; input should be"),
        ("--quantization", "none-such", "with --quantization none-such"),
        ("--data-parallel-size", "8", "with --shard 1/8 and so on"),
        ("--data-parallel-size", "0", "expected 1"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_read(
    flag: str,
    value: str,
    words: str,
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*command, flag, value]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_give_the_answers_of_one(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of each
    assert main([*command, "--tensor-parallel-size", "2"]) == 0
    two = tmp_path / "two"
    shutil.move(tmp_path / "out", two)
    assert main(command) == 0
    found, expected = rows(two), rows(tmp_path / "out")
    assert found == expected
    assert sum(map(len, found.values())) == 6
    assert read_provenance(two) == read_provenance(tmp_path / "out")
