#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Pack what a GPU machine without a network needs, in loads of a limited size.

python tools/gpu/pack.py --out FOLDER [--vllm 0.32.0] [ARCHIVE ...]

Everything comes from the index that pip is configured for. Of vLLM's wheel only the
members that are needed are fetched, by HTTP range requests.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import fsspec
from loads import split

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MIB = 1 << 20

# Of vLLM's 300 MB. The rest serves other models (MoE, MLA), other GPUs, or the server.
KERNELS = (
    "vllm/_C_stable_libtorch.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
    "vllm/cumem_allocator.abi3.so",
    "vllm/spinloop.abi3.so",
)
TEXTS = (".py", ".json", ".jinja", "METADATA", "entry_points.txt", "top_level.txt")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="must not exist yet")
    parser.add_argument("--vllm", default="0.32.0", help="its version")
    parser.add_argument("--python", default="3.12", help="the GPU machine's Python")
    parser.add_argument("--load-mib", type=int, default=58, help="most MiB per load")
    parser.add_argument(
        "archives", nargs="*", metavar="ARCHIVE", help=", ".join(MAKERS)
    )
    options = parser.parse_args()
    wanted = options.archives or list(MAKERS)
    if unknown := set(wanted) - set(MAKERS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if options.out.exists():
        parser.error(f"--out {options.out}: is there already")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        archives = [make_archive(name, options, work) for name in wanted]
        index = split(archives, options.out, options.load_mib * MIB)
    for load in sorted(options.out.iterdir(), key=lambda path: int(path.name)):
        size = sum(file.stat().st_size for file in load.iterdir())
        print(f"load {load.name}: {size / MIB:.1f} MiB")
    print(f"{len(index)} archives in {options.out}")
    return 0


def make_archive(name: str, options: argparse.Namespace, work: Path) -> Path:
    """One archive: ``site/`` is copied, the ``.whl`` of ``wheels/`` are installed."""
    content = work / name
    (content / "site").mkdir(parents=True)
    (content / "wheels").mkdir()
    MAKERS[name](content, options)
    # Wheels hardly get smaller.
    compress = name.startswith("vllm")
    archive = work / (f"{name}.tar.xz" if compress else f"{name}.tar")
    with tarfile.open(archive, "w:xz" if compress else "w") as tar:
        for folder in ("site", "wheels"):
            tar.add(content / folder, folder)
    raw = sum(file.stat().st_size for file in content.rglob("*") if file.is_file())
    shutil.rmtree(content)
    packed = archive.stat().st_size
    print(f"{name}: {raw / MIB:.1f} MiB, packed {packed / MIB:.1f} MiB", flush=True)
    return archive


def vllm_python(content: Path, options: argparse.Namespace) -> None:
    """vLLM's Python files, and the metadata that tells its version."""
    extract(f"vllm=={options.vllm}", options, lambda n: n.endswith(TEXTS), content)


def vllm_kernels(content: Path, options: argparse.Namespace) -> None:
    """The compiled libraries that a dense model on a Hopper GPU needs."""
    extract(f"vllm=={options.vllm}", options, lambda n: n in KERNELS, content)


def needs(content: Path, options: argparse.Namespace) -> None:
    """Packages that vLLM imports and the GPU machine lacks (wheels.txt)."""
    download(["-r", str(HERE / "wheels.txt")], options, content / "wheels")


def package(content: Path, options: argparse.Namespace) -> None:
    """This package: its metadata is how vLLM finds the method. The code that is
    measured is the checkout's."""
    with tempfile.TemporaryDirectory() as folder:
        # A copy, because building leaves its files in the source tree.
        source = Path(folder) / "source"
        unused = shutil.ignore_patterns(
            *(".*", "build", "*.egg-info", "tests", "docs", "references", "drafters")
        )
        shutil.copytree(ROOT, source, ignore=unused, symlinks=True)
        build = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder)
        pip(*build, str(source))
        (wheel,) = Path(folder).glob("*.whl")
        unzip(zipfile.ZipFile(wheel), lambda name: True, content)


MAKERS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "vllm-python": vllm_python,
    "vllm-kernels": vllm_kernels,
    "needs": needs,
    "package": package,
}


def platform_flags(options: argparse.Namespace) -> list[str]:
    """Make pip choose wheels for the GPU machine and not for this one."""
    flags = ["--only-binary=:all:", "--implementation", "cp"]
    flags += ["--python-version", options.python]
    # pip takes each of these exactly as it is named.
    for tag in ("2_35", "2_34", "2_31", "2_28", "2_27", "2_24", "2_17", "2_12", "2_5"):
        flags += ["--platform", f"manylinux_{tag}_x86_64"]
    for tag in ("manylinux2014_x86_64", "manylinux1_x86_64"):
        flags += ["--platform", tag]
    return flags


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def download(
    requirements: Iterable[str], options: argparse.Namespace, out: Path
) -> None:
    flags = platform_flags(options)
    pip("download", "--quiet", "--no-deps", *flags, "-d", str(out), *requirements)


def extract(
    requirement: str,
    options: argparse.Namespace,
    wanted: Callable[[str], bool],
    content: Path,
) -> None:
    """Fetch some members of a wheel; zipfile checks each one's CRC."""
    report = json.loads(
        pip(
            *("install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed"),
            *platform_flags(options),
            *("--target", str(content), "--report", "-", requirement),
        )
    )
    url = report["install"][0]["download_info"]["url"]
    with fsspec.open(url, block_size=4 * MIB) as remote:
        unzip(zipfile.ZipFile(remote), wanted, content)


def unzip(
    archive: zipfile.ZipFile, wanted: Callable[[str], bool], content: Path
) -> None:
    members = [name for name in archive.namelist() if wanted(name)]
    if not members:
        raise SystemExit("pack: nothing in the wheel matches; was it renamed?")
    archive.extractall(content / "site", members)


if __name__ == "__main__":
    sys.exit(main())
