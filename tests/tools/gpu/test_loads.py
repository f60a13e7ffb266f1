# SPDX-License-Identifier: Apache-2.0
"""Packing for the GPU machine: what is cut comes back, and damage is found."""

from pathlib import Path

import pytest

from tools.gpu import loads


@pytest.fixture
def archives(tmp_path: Path) -> list[Path]:
    """One smaller than a load, an empty one, and one that spans three loads."""
    files = []
    for name, size in (("a.tar", 70), ("b.tar", 0), ("c.tar", 230)):
        files.append(tmp_path / name)
        files[-1].write_bytes(bytes((i * 7 + size) % 251 for i in range(size)))
    return files


def collected(archives: list[Path], out: Path, numbers: tuple[int, ...]) -> Path:
    pool = out / "pool"
    loads.split(archives, out, 100)
    for load in numbers:
        loads.collect(out / str(load), pool)
    return pool


def test_what_was_split_is_joined(archives: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    pool = collected(archives, out, (3, 1, 2))
    index = loads.read_index(out / "2")
    for archive in archives:
        joined = loads.join(index, archive.name, pool, tmp_path / "joined")
        assert joined.read_bytes() == archive.read_bytes()


def test_no_load_is_larger_than_allowed(archives: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = loads.split(archives, out, 100)
    for load in ("1", "2", "3"):
        files = (out / load).glob("*.tar.*")
        assert sum(file.stat().st_size for file in files) == 100
    assert [piece["load"] for piece in index["c.tar"]["pieces"]] == [1, 2, 3]


def test_a_missing_load_is_named(archives: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    pool = collected(archives, out, (1, 3))
    index = loads.read_index(out / "1")
    assert loads.missing_loads(index["a.tar"], pool) == []
    with pytest.raises(loads.LoadsError, match=r"c\.tar: pieces of load \[2\]"):
        loads.join(index, "c.tar", pool, tmp_path / "joined")


def test_damage_is_found(archives: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    pool = collected(archives, out, (1, 2, 3))
    index = loads.read_index(out / "1")
    piece = pool / index["c.tar"]["pieces"][1]["file"]
    piece.write_bytes(piece.read_bytes()[:-1] + b"x")
    with pytest.raises(loads.LoadsError, match="send load 2 again"):
        loads.join(index, "c.tar", pool, tmp_path / "joined")
