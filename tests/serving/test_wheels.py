# SPDX-License-Identifier: Apache-2.0
"""Both distributions, built and installed as users get them, and served by vLLM."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.packages import copy_drafter
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.serving.resolve import resolve_drafter

ROOT = Path(__file__).parents[2]
# What a build needs. Building leaves files in the source tree, so a copy is built.
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "vllm_mtp", "drafters")
DRAFTERS = ROOT / "vllm_mtp" / "references" / "smollm2-135m-instruct"
MB = 10**6


def python(*arguments: object, **options: object) -> str:
    """Run Python; no index is asked for anything."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")
OFFLINE = ("--no-index", "--no-deps")


def build_wheel(project: Path, out: Path) -> Path:
    before = set(out.glob("*.whl"))
    python(*PIP, "wheel", *OFFLINE, "--no-build-isolation", "-w", out, project)
    (wheel,) = set(out.glob("*.whl")) - before
    return wheel


@dataclass(frozen=True)
class Wheels:
    main: Path
    drafters: Path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    root = tmp_path_factory.mktemp("wheels")
    unused = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=unused, symlinks=True)
        else:
            shutil.copy(ROOT / name, root / name)
    # As `python -m build` goes: the wheel is made of the sdist.
    code = "from setuptools import build_meta; build_meta.build_sdist('sdist')"
    python("-c", code, cwd=root)
    (sdist,) = (root / "sdist").glob("*.tar.gz")
    out = root / "out"
    return Wheels(build_wheel(sdist, out), build_wheel(root / "drafters/smollm2", out))


def test_the_main_wheel_is_small_and_has_the_code_alone(wheels: Wheels) -> None:
    assert wheels.main.stat().st_size < MB
    with zipfile.ZipFile(wheels.main) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_mtp").rglob("*.py")}
    assert names == code | {"vllm_mtp/py.typed"}


def test_the_drafters_wheel_has_the_drafters_whole(wheels: Wheels) -> None:
    with zipfile.ZipFile(wheels.drafters) as wheel:
        found = {
            info.filename: info.CRC
            for info in wheel.infolist()
            if ".dist-info/" not in info.filename
        }
    expected = {
        f"vllm_mtp_smollm2/{path.relative_to(DRAFTERS)}": zlib.crc32(path.read_bytes())
        for path in DRAFTERS.rglob("*.*")
    }
    assert len(expected) > 4
    assert found.pop("vllm_mtp_smollm2/__init__.py")
    assert found == expected


def test_a_package_made_as_the_page_says_is_found(
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = (ROOT / "docs" / "drafter-packages.md").read_text("utf-8")
    project, site = tmp_path / "project", tmp_path / "site"
    copy_drafter(
        tiny_drafter("llama", "shared-4"), project / "src/smollm2_drafters/small"
    )
    settings = page.partition("```toml\n")[2].partition("```")[0]
    (project / "pyproject.toml").write_text(settings, "utf-8")
    with zipfile.ZipFile(build_wheel(project, tmp_path)) as wheel:
        wheel.extractall(site)
    monkeypatch.syspath_prepend(site)
    target = tiny_targets["llama"]
    found = resolve_drafter(None, str(target), TargetFacts.from_folder(target))
    assert found == site / "smollm2_drafters" / "small"


@pytest.fixture(scope="module")
def environment(wheels: Wheels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both wheels, the packages that this Python has, and not the checkout."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    python("-m", "venv", "--without-pip", folder)
    inside = ("--python", folder / "bin" / "python")
    both = (wheels.main, wheels.drafters)
    # `--ignore-installed`: never to touch what is seen through the file below.
    python(*PIP, *inside, "install", *OFFLINE, "--ignore-installed", *both)
    # Of a folder that a .pth file names, no .pth file is read: so this environment has
    # the installed packages, but not what is there as a link to the checkout.
    installed = [
        path
        for path in sys.path
        if Path(path).name in ("site-packages", "dist-packages")
    ]
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text("\n".join(installed) + "\n", "utf-8")
    return folder


def run_in(environment: Path, *command: object) -> str:
    variables = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    } | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # A second process would spend a core on waiting.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }
    done = subprocess.run(
        list(map(str, command)),
        cwd=environment.parent,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_installed_command_lists_the_drafters(environment: Path) -> None:
    command = environment / "bin" / "vllm-mtp"
    found = json.loads(run_in(environment, command, "references", "--json"))
    assert [item["name"] for item in found] == ["cheap", "shared"]
    assert all(Path(item["folder"]).is_relative_to(environment) for item in found)


@pytest.mark.engine
def test_the_method_alone_serves_with_an_installed_drafter(
    environment: Path, smollm2: Path
) -> None:
    script = shutil.copy(Path(__file__).with_name("method_only.py"), environment)
    result = environment / "result.json"
    run_in(environment, environment / "bin/python", "-I", script, smollm2, result)
    told = json.loads(result.read_text("utf-8"))
    assert Path(told["package"]).is_relative_to(environment)
    assert Path(told["drafter"]).is_relative_to(environment)
    assert Path(told["drafter"]).parts[-2:] == ("vllm_mtp_smollm2", "cheap")
    assert not [place for place in told["path"] if Path(place) == ROOT]
    assert all(told["texts"])
    # On a busy machine the method may soon find that drafts do not pay. But first it
    # tries one for each of six requests, and 0.7 tokens of each were accepted.
    assert told["drafts"] >= 6
    assert told["accepted"] > 0
