# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp references``."""

import json
import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import vllm_mtp
from vllm_mtp.cli import references
from vllm_mtp.cli.main import main
from vllm_mtp.references import reference_folders

INDEX = json.loads(files("vllm_mtp.references").joinpath("index.json").read_text())
SHIPPED = reference_folders()[0]


def listed(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["references", *flags]) == 0
    return capsys.readouterr().out


def test_lists_what_the_index_holds(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(listed(capsys, "--json"))
    root = str(files("vllm_mtp.references"))
    assert [Path(item["folder"]) for item in found] == [Path(root, n) for n in INDEX]
    assert [item["name"] for item in found] == [n.rpartition("/")[2] for n in INDEX]
    assert found[0]["default"] is True
    lines = listed(capsys).splitlines()
    assert len(lines) == len(INDEX)
    for line, item in zip(lines, found, strict=True):
        assert line.split()[:2] == [item["name"], item["target"]]
        assert item["folder"] in line
        assert ("taken when no model is named" in line) == item["default"]


def copy_as(folder: Path, **target: object) -> Path:
    """The first shipped drafter's config, for another target if asked for."""
    config = json.loads((SHIPPED / "config.json").read_text())
    config["target"] |= target
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_first_that_fits_a_target_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [
        copy_as(tmp_path / "first"),
        copy_as(tmp_path / "second", name="a copy, elsewhere"),
        copy_as(tmp_path / "other", weights_fingerprint="0" * 64),
        copy_as(tmp_path / "larger", vocab_size=50000),
    ]
    monkeypatch.setattr(references, "reference_folders", lambda: folders)
    found = {item.name: item.default for item in references.shipped()}
    assert found == {"first": True, "second": False, "other": True, "larger": True}


def test_a_damaged_installation_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(references, "reference_folders", lambda: [tmp_path / "gone"])
    assert main(["references"]) == 1
    assert "gone/config.json: cannot be read" in capsys.readouterr().err


def test_works_where_it_is_installed_and_without_torch(tmp_path: Path) -> None:
    """As a wheel lays it out: somewhere else, and with no checkout around it."""
    site = tmp_path / "site-packages"
    shutil.copytree(
        Path(vllm_mtp.__file__).parent,
        site / "vllm_mtp",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    code = (
        "import sys; from vllm_mtp.cli.references import References; "
        "References(json=True).run(); sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [Path(item["folder"]) for item in found] == [
        site.resolve() / "vllm_mtp" / "references" / name for name in INDEX
    ]
