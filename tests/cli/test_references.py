# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp references``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packages import install
from vllm_mtp import installed
from vllm_mtp.cli import references
from vllm_mtp.cli.main import main
from vllm_mtp.installed import installed_folder

OURS = "vllm-mtp-smollm2-135m-instruct"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def listed(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["references", *flags]) == 0
    return capsys.readouterr().out


def test_lists_our_package(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(listed(capsys, "--json"))
    assert [item["name"] for item in found] == ["cheap", "shared"]
    assert [item["default"] for item in found] == [True, False]
    lines = listed(capsys).splitlines()
    assert len(lines) == len(found)
    for line, item in zip(lines, found, strict=True):
        assert item["distribution"] == OURS
        assert item["folder"] == str(installed_folder(item["name"]))
        assert line.split()[:5] == [
            item["name"],
            item["target"],
            f"k={item['num_speculative_tokens']}",
            item["distribution"],
            item["folder"],
        ]
        assert ("taken when no model is named" in line) == item["default"]


def write_config(folder: Path, **target: object) -> None:
    """The config of `cheap`, for another target if asked for."""
    config = json.loads((installed_folder("cheap") / "config.json").read_text())
    config["target"] |= target
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))


def test_the_first_that_fits_a_target_is_the_default(site: Path) -> None:
    write_config(site / "maker" / "larger", vocab_size=50000)
    write_config(site / "maker" / "other", weights_fingerprint="0" * 64)
    write_config(site / "maker" / "second", name="a copy, elsewhere")
    places = {name: f"maker.{name}" for name in ("larger", "other", "second")}
    install(site, "z-drafters", places)
    install(site, "y-drafters", {"again": "maker.other"})
    found = {item.name: item.default for item in references.shipped()}
    assert found == {
        "cheap": True,
        "shared": False,
        "again": True,
        "larger": True,
        "other": False,
        "second": False,
    }


def test_a_broken_one_is_told_beside_the_others(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (site / "maker" / "damaged").mkdir(parents=True)
    (site / "maker" / "damaged" / "config.json").write_text("{")
    places = {"lost": "nowhere.lost", "empty": "maker.empty", "bad": "maker.damaged"}
    install(site, "a-drafters", places)
    assert main(["references", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [item["name"] for item in json.loads(out)] == ["cheap", "shared"]
    lines = err.splitlines()
    for line, name, problem in zip(
        lines,
        ("bad", "empty", "lost"),
        (
            f"{site}/maker/damaged/config.json: cannot be read",
            f"{site}/maker/empty/config.json: cannot be read",
            "no package 'nowhere' can be imported",
        ),
        strict=True,
    ):
        assert line.startswith(f"vllm-mtp references: broken: {name} of a-drafters: ")
        assert problem in line
        assert "install a-drafters again" in line


def test_says_that_there_are_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installed, "entry_points", lambda group: ())
    assert json.loads(listed(capsys, "--json")) == []
    assert "no installed package offers a drafter" in listed(capsys)


def test_works_without_torch() -> None:
    """Which would take seconds to import."""
    code = (
        "import sys; from vllm_mtp.cli.references import References; "
        "References(json=True).run(); sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)) == 2
