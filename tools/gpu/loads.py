# SPDX-License-Identifier: Apache-2.0
"""Archives cut into loads of a limited size, and put together again.

A load is a folder that one transfer takes along. Loads are filled one after the other,
so an archive may begin in one and end in the next. Each load holds the whole index, so
any of them tells what is still missing. Only the standard library is used: the other
machine may have nothing else yet.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

INDEX = "index.json"
_CHUNK = 1 << 20


class Piece(TypedDict):
    """One file of a load."""

    file: str
    load: int  # from 1
    sha256: str


class Entry(TypedDict):
    """One archive of the index."""

    sha256: str
    pieces: list[Piece]


Index = dict[str, Entry]


class LoadsError(Exception):
    """A piece is missing or damaged."""


def sha256_of(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def split(archives: Iterable[Path], out: Path, load_bytes: int) -> Index:
    """Cut archives into the loads ``out/1``, ``out/2``, ...

    Args:
        archives: Files with different names, the most needed first.
        out: Folder that takes the loads.
        load_bytes: Most bytes of pieces in a load.
    """
    if load_bytes < 1:
        raise ValueError(f"load_bytes: got {load_bytes}, expected 1 or more")
    index: Index = {}
    load, room = 1, load_bytes
    for archive in archives:
        pieces: list[Piece] = []
        left = archive.stat().st_size
        with archive.open("rb") as data:
            while left or not pieces:
                if room == 0:
                    load, room = load + 1, load_bytes
                size = min(left, room)
                file = out / str(load) / f"{archive.name}.{len(pieces):02d}"
                _copy(data, file, size)
                sha256 = sha256_of(file)
                pieces.append({"file": file.name, "load": load, "sha256": sha256})
                left, room = left - size, room - size
        index[archive.name] = {"sha256": sha256_of(archive), "pieces": pieces}
    for number in range(1, load + 1):
        (out / str(number) / INDEX).write_text(json.dumps(index, indent=1), "utf-8")
    return index


def _copy(data: object, file: Path, size: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as piece:
        while size:
            chunk = data.read(min(size, _CHUNK))  # type: ignore[attr-defined]
            piece.write(chunk)
            size -= len(chunk)


def read_index(load: Path) -> Index:
    return json.loads((load / INDEX).read_text("utf-8"))


def collect(load: Path, pool: Path) -> None:
    """Copy a load's pieces into ``pool``, where those of other loads lie."""
    pool.mkdir(parents=True, exist_ok=True)
    for file in load.iterdir():
        shutil.copyfile(file, pool / file.name)


def missing_loads(entry: Entry, pool: Path) -> list[int]:
    """Loads that still have to be collected before the archive is whole."""
    return sorted(
        {p["load"] for p in entry["pieces"] if not (pool / p["file"]).is_file()}
    )


def join(index: Mapping[str, Entry], name: str, pool: Path, out: Path) -> Path:
    """Put an archive together and check every sum.

    Args:
        index: As `split` made it.
        name: The archive's file name.
        pool: Where the pieces lie.
        out: Folder that takes the archive.

    Raises:
        LoadsError: Says which piece is missing or damaged, and its load.
    """
    entry = index[name]
    if loads := missing_loads(entry, pool):
        raise LoadsError(f"{name}: pieces of load {loads} are missing; send them")
    out.mkdir(parents=True, exist_ok=True)
    with (out / name).open("wb") as archive:
        for piece in entry["pieces"]:
            file = pool / piece["file"]
            if (got := sha256_of(file)) != piece["sha256"]:
                raise LoadsError(
                    f"{file}: sha256 is {got}, expected {piece['sha256']}; send load "
                    f"{piece['load']} again"
                )
            with file.open("rb") as data:
                shutil.copyfileobj(data, archive, _CHUNK)
    if (got := sha256_of(out / name)) != entry["sha256"]:
        raise LoadsError(
            f"{name}: sha256 is {got}, expected {entry['sha256']}: the loads are of "
            "different packings; send all of one packing"
        )
    return out / name
