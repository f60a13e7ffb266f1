# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp push``."""

from pathlib import Path
from typing import Any

import pytest

from tests.drafter.test_checkpoint import make_drafter
from vllm_mtp.cli.main import main
from vllm_mtp.sharing import hub
from vllm_mtp.sharing.folder import write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(make_drafter(extra_rows=0), tmp_path / "drafter")


def test_dry_run_shows_files_and_card_without_network(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HfApi", None)
    (folder / "optimizer.pt").write_bytes(b"state")
    assert main(["push", str(folder), "--repo-id", "jane/d", "--dry-run"]) == 0
    out = capsys.readouterr().out
    listed = [line.split()[0] for line in out.splitlines() if line.endswith(" bytes")]
    assert listed == ["README.md", "config.json", "model.safetensors"]
    assert "library_name: vllm-mtp" in out
    assert '"model":"jane/d"' in out


def test_flags_reach_the_hub(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def push(*arguments: Any, **settings: Any) -> str:
        given.update(settings, arguments=arguments)
        return "https://huggingface.co/jane/d"

    monkeypatch.setattr(hub, "push_to_hub", push)
    assert main(["push", str(folder), "--repo-id", "d", "--private"]) == 0
    assert given["arguments"] == (str(folder), "d")
    assert given["private"] is True
    assert "https://huggingface.co/jane/d" in capsys.readouterr().out


def test_nothing_to_push(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(tmp_path), "--repo-id", "jane/d"]) == 1
    assert "config.json: no such file" in capsys.readouterr().err
