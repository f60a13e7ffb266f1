# SPDX-License-Identifier: Apache-2.0
"""Ways to damage a drafter's folder, as hypothesis strategies.

Each strategy draws a `Damage`. `REFUSED` holds those after which no reader may take
the folder; `HARMLESS` those that leave what the format allows, and `VALUES` those
that may do either.
"""

import copy
import json
import os
import pickle
import shutil
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save

from vllm_mtp.drafter.checkpoint import CONFIG_FILE, WEIGHTS_FILE

Json = dict[str, Any]
KeyPath = tuple[str | int, ...]


class Good(NamedTuple):
    """A whole drafter's files."""

    kind: str
    config: bytes
    weights: bytes

    def __repr__(self) -> str:
        return f"Good({self.kind!r})"

    @property
    def header(self) -> Json:
        return json.loads(self.weights[8 : 8 + self._header_size])

    @property
    def body(self) -> bytes:
        return self.weights[8 + self._header_size :]

    @property
    def _header_size(self) -> int:
        return int.from_bytes(self.weights[:8], "little")

    @property
    def body_start(self) -> int:
        return 8 + self._header_size

    @property
    def tensor_names(self) -> list[str]:
        return sorted(set(self.header) - {"__metadata__"})

    def write(self, folder: Path) -> None:
        folder.mkdir()
        (folder / CONFIG_FILE).write_bytes(self.config)
        (folder / WEIGHTS_FILE).write_bytes(self.weights)


class Damage(NamedTuple):
    """One way to damage; ``do`` gets the folder of a whole drafter."""

    name: str
    do: Callable[[Path], Any]

    def __repr__(self) -> str:
        return f"Damage({self.name!r})"


def _with_weights(name: str, data: bytes) -> Damage:
    return Damage(name, lambda folder: (folder / WEIGHTS_FILE).write_bytes(data))


def _with_config(name: str, data: bytes) -> Damage:
    return Damage(name, lambda folder: (folder / CONFIG_FILE).write_bytes(data))


def _flip(data: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


def remove(root: Path) -> None:
    """Empty a folder of whatever damages left there."""
    for path in root.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


# --- The weights file as bytes


def _with_header(name: str, good: Good, header: bytes) -> Damage:
    return _with_weights(name, struct.pack("<Q", len(header)) + header + good.body)


@st.composite
def cut_weights(draw: st.DrawFn, good: Good) -> Damage:
    size = draw(st.integers(0, len(good.weights) - 1))
    return _with_weights("weights cut off", good.weights[:size])


@st.composite
def longer_weights(draw: st.DrawFn, good: Good) -> Damage:
    more = draw(st.binary(min_size=1, max_size=64))
    return _with_weights("weights with more behind", good.weights + more)


@st.composite
def header_length(draw: st.DrawFn, good: Good) -> Damage:
    whole = good.body_start - 8
    near = st.integers(max(0, whole - 16), whole + 16)
    huge = st.sampled_from([0, 2, 10**8, 10**8 + 1, 2**32, 2**63 - 1, 2**64 - 1])
    size = draw((near | huge | st.integers(0, 2**64 - 1)).filter(lambda n: n != whole))
    data = struct.pack("<Q", size) + good.weights[8:]
    return _with_weights("header of another length", data)


HEADERS = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"7",
    b'"text"',
    b"\xff\xfe{}",
    b"{}" * 9,
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"__metadata__":{"format":7}}',
    b'{"__metadata__":' + b"[" * 1000 + b"]" * 1000 + b"}",
]


@st.composite
def other_header(draw: st.DrawFn, good: Good) -> Damage:
    header = draw(st.sampled_from(HEADERS) | st.binary(max_size=64))
    return _with_header("header that is none", good, header)


_SHAPES = st.sampled_from(
    [[2**62], [2**32, 2**32], [10**30], [-1], [1.5], ["4"], None, 7, [[4]], [0, 0]]
)
_OFFSETS = st.sampled_from(
    [
        *([0, 2**63], [2**64 - 1, 2**64], [-8, 8], [8, 0], [0, 10**30]),
        *([0], [0, 1, 2], ["0", "8"], None, {}, [0.5, 8]),
    ]
)


@st.composite
def tensor_entry(draw: st.DrawFn, good: Good) -> Damage:
    """One field of one tensor's entry in the header."""
    header = good.header
    name = draw(st.sampled_from(good.tensor_names))
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    entry = header[name]
    if field == "dtype":
        kinds = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3"]
        values = st.sampled_from([*kinds, "F128", "", "f32", 7, None, ["F32"]])
    elif field == "shape":
        shape = entry["shape"]
        near = [[*shape, 1], shape[:-1], [shape[0] + 1, *shape[1:]], [*shape, 2**60]]
        values = _SHAPES | st.sampled_from(near)
    else:
        start, end = entry["data_offsets"]
        shift = draw(st.integers(-64, 64).filter(bool))
        near = [
            [start + shift, end + shift],
            [start, end + shift],
            [start + shift, end],
        ]
        values = _OFFSETS | st.sampled_from(near)
    entry[field] = draw(values.filter(lambda value: value != entry[field]))
    return _with_header(f"{field} in the header", good, json.dumps(header).encode())


_NAMES = ["", "lm_head", "../../model", "/etc/passwd", "__class__", "a\0b", "x" * 10**5]


@st.composite
def tensor_names(draw: st.DrawFn, good: Good) -> Damage:
    """Another set of names in the header, over the same bytes."""
    header = good.header
    name = draw(st.sampled_from(good.tensor_names))
    how = draw(st.sampled_from(["renamed", "dropped", "null", "extra", "twice"]))
    entry = header[name]
    if how == "twice":  # which a JSON library writes only by hand
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
        return _with_header("tensor twice", good, text.encode())
    if how == "extra":
        size = len(good.body)
        more = {"dtype": "U8", "shape": [0], "data_offsets": [size, size]}
        header[draw(st.sampled_from(_NAMES))] = more
    elif how == "null":
        header[name] = None
    else:
        del header[name]
        if how == "renamed":
            header[draw(st.sampled_from(_NAMES))] = entry
    return _with_header(f"tensor {how}", good, json.dumps(header).encode())


@st.composite
def overlapping(draw: st.DrawFn, good: Good) -> Damage:
    """Two tensors that share bytes, the second's being nobody's."""
    header = good.header
    first, second = draw(st.permutations(good.tensor_names))[:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    return _with_header("overlapping tensors", good, json.dumps(header).encode())


@st.composite
def other_tensors(draw: st.DrawFn, good: Good) -> Damage:
    """A sound safetensors file of other tensors."""
    tensors = load(good.weights)
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    changes: dict[str, Callable[[], Any]] = {
        "missing tensor": lambda: tensors.pop(name),
        "extra tensor": lambda: tensors.update(extra=torch.zeros(1)),
        "no tensor": tensors.clear,
        "wider": lambda: tensors.update({name: torch.cat([tensor, tensor])}),
        "flat": lambda: tensors.update({name: tensor.flatten()[None]}),
        "scalar": lambda: tensors.update({name: tensor.flatten()[0].clone()}),
        "empty": lambda: tensors.update({name: tensor[:0].clone()}),
        "double": lambda: tensors.update({name: tensor.double()}),
        "integer": lambda: tensors.update({name: tensor.to(torch.int16)}),
    }
    what = draw(st.sampled_from(sorted(changes)))
    changes[what]()
    return _with_weights(f"other tensors: {what}", save(tensors))


@st.composite
def bad_values(draw: st.DrawFn, good: Good) -> Damage:
    """A weight that is no number, or a token id that is no token's."""
    tensors = load(good.weights)
    name = draw(st.sampled_from(sorted(tensors)))
    flat = tensors[name].view(-1)
    where = draw(st.integers(0, flat.numel() - 1))
    if flat.is_floating_point():
        flat[where] = draw(st.sampled_from([float(x) for x in ("nan", "inf", "-inf")]))
    else:
        other = int(flat[where - 1])
        bad = st.sampled_from([-1, 10**6, 2**62, -(2**63), other])
        flat[where] = draw(bad)
    return _with_weights("values that are none", save(tensors))


@st.composite
def other_file(draw: st.DrawFn, good: Good, others: list[Good]) -> Damage:
    """Something else in place of one of the files."""
    contents = {
        "pickle": pickle.dumps({"a": 1}),
        "zip": b"PK\x03\x04" + bytes(60),
        "gzip": b"\x1f\x8b" + bytes(60),
        "zeros": bytes(draw(st.integers(0, 4096))),
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "noise": draw(st.binary(max_size=512)),
        "another drafter's": draw(st.sampled_from(others)).weights,
        "config": good.config,
    }
    what = draw(st.sampled_from(sorted(contents)))
    if what not in ("another drafter's", "config") and draw(st.booleans()):
        return _with_config(f"config is {what}", contents[what])
    return _with_weights(f"weights are {what}", contents[what])


# --- Files that are none


def _replace_by(path: Path, kind: str) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "link to a folder":
        path.symlink_to("/")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            # The whole path may be longer than a socket's address.
            here = os.open(path.parent, os.O_RDONLY)
            server.bind(f"/proc/self/fd/{here}/{path.name}")
            os.close(here)
    elif kind.startswith("/"):
        path.symlink_to(kind)


NO_FILES = [
    *("nothing", "folder", "dangling link", "link to itself", "link to a folder"),
    *("pipe", "socket", "/dev/zero", "/dev/null", "/dev/stdin", "/etc/passwd"),
    *("/proc/self/environ", "/proc/self/mem", "/proc/kcore"),
]


@st.composite
def no_file(draw: st.DrawFn, good: Good) -> Damage:
    name = draw(st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]))
    kind = draw(st.sampled_from(NO_FILES))
    return Damage(f"{name} is {kind}", lambda folder: _replace_by(folder / name, kind))


@st.composite
def no_folder(draw: st.DrawFn, good: Good) -> Damage:
    kind = draw(st.sampled_from(NO_FILES))
    return Damage(f"the folder is {kind}", lambda folder: _replace_by(folder, kind))


@st.composite
def huge_file(draw: st.DrawFn, good: Good) -> Damage:
    """A file of up to a tebibyte, all of it but the start a hole."""
    name = draw(st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]))
    size = 1 << draw(st.integers(21, 40))
    return Damage("huge file", lambda folder: os.truncate(folder / name, size))


@st.composite
def sharded(draw: st.DrawFn, good: Good) -> Damage:
    """The weights elsewhere, as an index would tell."""
    positions = ["model-00001-of-00001.safetensors", "../model.safetensors"]
    position = draw(st.sampled_from([*positions, "/etc/passwd", "pytorch_model.bin"]))
    index = {"weight_map": dict.fromkeys(good.tensor_names, position)}

    def do(folder: Path) -> None:
        (folder / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps(index))
        (folder / WEIGHTS_FILE).rename(folder / positions[0])

    return Damage("sharded", do)


# --- The config


def walk(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every object, list and leaf with its path."""
    yield path, value
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, child in items:
        yield from walk(child, (*path, key))


def _at(config: Any, path: KeyPath) -> Any:
    for key in path:
        config = config[key]
    return config


def _is_free(path: KeyPath) -> bool:
    return path[:2] == ("target", "rope_parameters")


_NO_OBJECT: list[Any] = [7, "x", True, 1.5, [[]]]
_NO_LIST: list[Any] = [{}, "q_proj", 7, True, None, [], [None], [7], [[]]]
# Such lists may be this too.
_SOUND: list[tuple[str | int, Any]] = [
    *(("full_rank", []), ("boundary_layers", [])),
    ("cached_layers", None),
]
_NO_BOOL: list[Any] = ["true", 1, 0, None, [], {}, 1.5]
_NO_INT: list[Any] = [
    *("4", "", 1.5, 4.0, True, False, [1], {"a": 1}, -1, -(10**30)),
    *(10**12, 2**63, 2**64, 10**30, float("nan"), float("inf"), 1e300),
]
_NO_FLOAT: list[Any] = [
    *("1", True, [], {}, None, -1.0, 0, float("nan"), -float("inf"), 1e300, 10**40),
]
_NO_TEXT: list[Any] = [7, True, 1.5, [], {}, ["a"]]
_NO_CHOICE: list[Any] = ["", "x", "\0", None, "q_proj\n", "../own", "F" * 1000]
_CHOICES = (
    *("model_type", "kind", "dtype", "form", "attention", "boundary_of"),
    *("input", "block_mask", "lm_head"),
)


def _wrong_for(path: KeyPath, value: Any) -> list[Any]:
    if isinstance(value, dict):
        return _NO_OBJECT
    if isinstance(value, list):
        return [x for x in _NO_LIST if (path[-1], x) not in _SOUND]
    if isinstance(value, bool):
        return _NO_BOOL
    if isinstance(value, int):
        return _NO_INT
    if isinstance(value, float):
        return _NO_FLOAT
    chosen = path[-1] in _CHOICES and path[0] != "target" or "modules" in path
    return _NO_TEXT + _NO_CHOICE if chosen else _NO_TEXT


@st.composite
def wrong_value(draw: st.DrawFn, good: Good) -> Damage:
    """A value of another type or out of range."""
    config = json.loads(good.config)
    paths = [
        (path, value)
        for path, value in walk(config)
        if path and value is not None and not _is_free(path)
    ]
    path, value = draw(st.sampled_from(paths))
    _at(config, path[:-1])[path[-1]] = draw(st.sampled_from(_wrong_for(path, value)))
    return _with_config("value of another type", json.dumps(config).encode())


# Keys without which a config is another, or none.
_OPTIONAL = (
    *("name", "weights_fingerprint", "lora", "prefix_window"),
    *("norm", "norm_placement", "activation", "cached_layers"),
    *("parallel", "v_norm", "qk_norm_after_rope"),  # which have no tensors
    *("attention", "boundary_of", "block_mask"),
)


@st.composite
def other_keys(draw: st.DrawFn, good: Good) -> Damage:
    """A key too many, too few, or twice."""
    config = json.loads(good.config)
    objects = [
        (path, value)
        for path, value in walk(config)
        if isinstance(value, dict) and not _is_free(path)
    ]
    path, where = draw(st.sampled_from(objects))
    how = draw(st.sampled_from(["unknown", "missing", "twice"]))
    if how == "unknown":
        names = ["extra", "", "__class__", "auto_map", "../x", "a\0", "x" * 5000]
        value = draw(st.sampled_from([1, None, {}, "../../x", [[]], "x" * 5000]))
        where[draw(st.sampled_from(names))] = value
        return _with_config("unknown key", json.dumps(config).encode())
    optional = (*_OPTIONAL, "intermediate_size") if path == ("target",) else _OPTIONAL
    required = [key for key in where if key not in optional and where[key]]
    key = draw(st.sampled_from(required))
    if how == "missing":
        del where[key]
        return _with_config("missing key", json.dumps(config).encode())
    entry = json.dumps({key: where[key]})[1:-1]
    where["MARK"] = 0
    text = json.dumps(config).replace('"MARK": 0', entry)
    return _with_config("key twice", text.encode())


def _grown(config: Json, good: Good) -> dict[str, Callable[[], Any]]:
    """Sound configs that the weights do not fit."""
    layer: Json = config["layers"][-1]
    own = {"kind": "own", "target_layer": 0, "rms_norm_eps": 1e-5}
    most = 1 << 24
    return {
        "fewer tokens": lambda: config.update(num_speculative_tokens=1),
        "more tokens": lambda: config.update(num_speculative_tokens=64),
        "too many tokens": lambda: config.update(num_speculative_tokens=10**9),
        "other dtype": lambda: config.update(
            dtype="float16" if config["dtype"] != "float16" else "bfloat16"
        ),
        "markov": lambda: config.update(markov={"rank": most}),
        "no markov": lambda: config.update(markov={"rank": 10**12}),
        "vocabulary": lambda: config.update(draft_vocab_size=7),
        "hidden": lambda: config["target"].update(hidden_size=most),
        "heads": lambda: config["target"].update(
            num_attention_heads=1 << 16, head_dim=1 << 16, hidden_size=most
        ),
        "own layer": lambda: config["layers"].append(own | {"intermediate_size": 8}),
        "wide own layer": lambda: config["layers"].append(
            own | {"intermediate_size": most, "bridge": True, "boundary_hidden": True}
        ),
        "100 own layers": lambda: config["layers"].extend(
            [own | {"intermediate_size": 8}] * 100
        ),
        "10^4 layers": lambda: config["layers"].extend([layer] * 10_000),
        "lora": lambda: config["layers"].append(
            {
                "kind": "shared",
                "target_layer": 0,
                "lora": {"rank": most, "alpha": 1.0, "modules": ["q_proj"]},
            }
        ),
        "version": lambda: config.update(format_version=2),
        "old version": lambda: config.update(format_version=0),
        "no layers": lambda: config.update(layers=[]),
    }


@st.composite
def other_config(draw: st.DrawFn, good: Good) -> Damage:
    config = json.loads(good.config)
    changes = _grown(config, good)
    what = draw(st.sampled_from(sorted(changes)))
    changes[what]()
    return _with_config(f"other config: {what}", json.dumps(config).encode())


TEXTS = [
    *(b"", b" ", b"{", b"}", b"null", b"[]", b"7", b'"text"', b"NaN", b"\0", b"{}{}"),
    *(b"\xff\xfe", b"\xef\xbb\xbf{}", b"\xed\xa0\x80", b"#!/bin/sh\n", b"<html>"),
    *(b"[" * 10**6, b'{"a":' * 10**5, b"[" * 10**5 + b"]" * 10**5, b"9" * 10**6),
    *(
        b'{"layers": [' + b"0," * 10**5 + b"0]}",
        b" " * (2**20 + 1),
        b"{" + b'"a":1,' * 10**5 + b'"b":1}',
        b'"' + b"x" * 10**6,
    ),
]


@st.composite
def config_text(draw: st.DrawFn, good: Good) -> Damage:
    """A config that is no JSON object in UTF-8, or not whole."""
    whole = good.config
    end = len(whole.rstrip())
    at = draw(st.integers(0, end - 1))
    numbers = [b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"0x10", b"1_0", b"01"]
    number = draw(st.sampled_from(numbers))
    changes = {
        "other text": draw(st.sampled_from(TEXTS)),
        "cut off": whole[:at],
        "more behind": whole + draw(st.sampled_from([b"{}", b"x", b"\0", b",", b"]"])),
        "not UTF-8": whole[:at] + b"\xff" + whole[at:],
        "odd number": whole.replace(b"10000.0", number),
        "too large": whole.ljust(2**20 + 1 + at),
        "UTF-16": whole.decode().encode("utf-16"),
        "commas": whole.replace(b"\n}", b",\n}"),
    }
    what = draw(st.sampled_from(sorted(changes)))
    return _with_config(f"config text: {what}", changes[what])


# --- What the format allows, or may allow


@st.composite
def flipped_weight(draw: st.DrawFn, good: Good) -> Damage:
    at = draw(st.integers(good.body_start, len(good.weights) - 1))
    data = _flip(good.weights, at, draw(st.integers(0, 7)))
    return _with_weights("flipped bit in a weight", data)


@st.composite
def flipped_header(draw: st.DrawFn, good: Good) -> Damage:
    at = draw(st.integers(0, good.body_start - 1))
    data = _flip(good.weights, at, draw(st.integers(0, 7)))
    return _with_weights("flipped bit in the header", data)


@st.composite
def flipped_config(draw: st.DrawFn, good: Good) -> Damage:
    at = draw(st.integers(0, len(good.config) - 1))
    data = _flip(good.config, at, draw(st.integers(0, 7)))
    return _with_config("flipped bit in the config", data)


@st.composite
def moved(draw: st.DrawFn, good: Good) -> Damage:
    """Files that are links, as in the hub's cache, and files beside them."""
    name = draw(st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]))
    what = draw(st.sampled_from(["link", "index", "other files"]))

    def do(folder: Path) -> None:
        if what == "link":
            blob = folder.with_name(f"{folder.name}-blob")
            (folder / name).rename(blob)
            (folder / name).symlink_to(blob)
        elif what == "index":
            index = {"weight_map": {"placeholders": "/etc/passwd"}}
            (folder / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps(index))
        else:
            os.mkfifo(folder / "pytorch_model.bin")
            (folder / "modeling.py").write_text("raise SystemExit")

    return Damage(f"harmless: {what}", do)


@st.composite
def informative(draw: st.DrawFn, good: Good) -> Damage:
    config = copy.deepcopy(json.loads(good.config))
    key = draw(st.sampled_from(["name", "weights_fingerprint"]))
    values = ["", "/etc/passwd", "../../x", "a\0b", "x" * 10**5, "\U0001f600", None]
    config["target"][key] = draw(st.sampled_from(values))
    return _with_config("harmless: informative key", json.dumps(config).encode())


Kind = Callable[[Good, list[Good]], st.SearchStrategy[Damage]]


def _of_one(make: Callable[[Good], st.SearchStrategy[Damage]]) -> Kind:
    return lambda good, _: make(good)


# After these no reader may take the folder; the number is how often each comes.
REFUSED: dict[str, tuple[Kind, int]] = {
    **{
        make.__name__: (_of_one(make), 1)
        for make in (
            *(cut_weights, longer_weights, header_length, other_header, tensor_entry),
            *(tensor_names, overlapping, other_tensors, bad_values, no_file, no_folder),
            *(huge_file, sharded, other_keys, other_config),
        )
    },
    "wrong_value": (_of_one(wrong_value), 2),
    "config_text": (_of_one(config_text), 2),
    "other_file": (other_file, 1),
}
# Flipped bits, some of which leave another drafter that is sound in itself.
VALUES: dict[str, tuple[Kind, int]] = {
    make.__name__: (_of_one(make), 1)
    for make in (flipped_weight, flipped_header, flipped_config)
}
# Changes that the format's rules allow.
HARMLESS: dict[str, tuple[Kind, int]] = {
    make.__name__: (_of_one(make), 1) for make in (moved, informative)
}


def any_of(kinds: Mapping[str, tuple[Kind, int]]) -> Kind:
    """Each kind as often as it is said to come."""
    return lambda good, others: st.one_of(
        *(make(good, others) for make, times in kinds.values() for _ in range(times))
    )
