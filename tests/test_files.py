# SPDX-License-Identifier: Apache-2.0
"""A text file is written whole, or an error names it and nothing changes."""

import os
from pathlib import Path

import pytest

from tests.full_disk import no_file_above
from vllm_mtp.errors import OutputError
from vllm_mtp.files import write_whole


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    write_whole(path, "before")
    with no_file_above(100), pytest.raises(OutputError) as caught:
        write_whole(path, "x" * 101)
    assert f"{path}: cannot be written ([Errno 27] File too large)" in str(caught.value)
    assert path.read_text("utf-8") == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_no_room_for_a_new_file_leaves_none(tmp_path: Path) -> None:
    with no_file_above(0), pytest.raises(OutputError):
        write_whole(tmp_path / "notes.md", "x")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a", tmp_path / "none" / "a", tmp_path):
        with pytest.raises(OutputError, match=f"^{path}: cannot be written"):
            write_whole(path, "x")

    def refuse(*_: object, **__: object) -> None:  # root may write everywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        write_whole(tmp_path / "a", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
