# SPDX-License-Identifier: Apache-2.0
"""Installed packages that offer drafters, as pip lays them out."""

import shutil
from collections.abc import Mapping
from pathlib import Path


def install(site: Path, distribution: str, drafters: Mapping[str, str]) -> None:
    """Write a distribution's metadata.

    Args:
        site: A folder on ``sys.path``.
        distribution: Its name.
        drafters: The entry points: name, and value.
    """
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    about = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
    (info / "METADATA").write_text(about, "utf-8")
    lines = [f"{name} = {value}" for name, value in drafters.items()]
    points = "\n".join(["[vllm_mtp.drafters]", *lines, ""])
    (info / "entry_points.txt").write_text(points, "utf-8")


def copy_drafter(source: Path, folder: Path) -> Path:
    """Put a drafter into a package."""
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, folder)
    return folder
