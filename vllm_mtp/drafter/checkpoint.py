# SPDX-License-Identifier: Apache-2.0
"""Read and write drafter folders: ``config.json`` and ``model.safetensors``.

Reading is strict. A folder either gives exactly the drafter that was written,
or an error that names the key or tensor, what was found, what was expected and
what to do. The format is described in ``checkpoints_spec/README.md``.
"""

import json
import math
import os
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_mtp.drafter.config import FORMAT_VERSION, DrafterConfig
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.errors import CheckpointError
from vllm_mtp.files import writing

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

# A config is some kilobytes. The limit keeps a wrong file from being read whole.
_MAX_CONFIG_BYTES = 1 << 20
# Of the largest drafter's config, and each wrong one costs an explanation.
_MAX_CONFIG_VALUES = 20_000
# A file of another drafter can be wrong in every tensor. The first lines tell.
_MAX_PROBLEMS = 20
_DTYPE_NAMES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "int64": "I64",
}


def save_drafter(drafter: Drafter, folder: Path | str) -> Path:
    """Write a drafter's folder.

    Each file appears whole or not at all: it is written beside its place and
    then moved there.

    Returns:
        The folder.

    Raises:
        OutputError: It cannot be written. What the folder held is then still there,
            or it holds no config and is refused.
    """
    folder = Path(folder)
    with writing(folder):
        _write(drafter, folder)
    return folder


def _write(drafter: Drafter, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: _as_stored(tensor, getattr(torch, drafter.config.dtype))
        for name, tensor in drafter.state_dict().items()
    }
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        weights = Path(scratch, WEIGHTS_FILE)
        save_file(tensors, weights, metadata={"format": "pt"})
        config = Path(scratch, CONFIG_FILE)
        config.write_text(drafter.config.model_dump_json(indent=2) + "\n", "utf-8")
        shutil.copymode(config, weights)  # safetensors lets only the owner read
        # A folder with a config has the weights of that config, whatever happens.
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        os.replace(weights, folder / WEIGHTS_FILE)
        os.replace(config, folder / CONFIG_FILE)


def read_config(folder: Path | str) -> DrafterConfig:
    """Read and check ``config.json``.

    Raises:
        CheckpointError: Names each wrong key with what was got and expected.
    """
    path = Path(folder, CONFIG_FILE)
    text = _read_text(path)
    try:
        config = DrafterConfig.model_validate_json(text)
        _require_plain_json(text)
        return config
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: not a valid drafter config:\n"
            + _listed(_explanations(error))
            + f"\nThis package reads format version {FORMAT_VERSION} (see "
            "checkpoints_spec/README.md); if the drafter is newer, update vllm-mtp."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not a valid drafter config: {error}") from None


def _require_plain_json(text: str) -> None:
    """Refuse what JSON leaves open: a key named twice, and numbers that are none."""

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"got the number {number[:40]}, expected a finite one")
        return value

    json.loads(
        text, object_pairs_hook=_named_once, parse_float=finite, parse_constant=finite
    )


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{_short(name)!r} stands there twice; remove one")
    return found


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def load_drafter(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Drafter:
    """Read a drafter's folder.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``.
        dtype: Convert floating-point weights to this type; default as stored.
        device: Where the weights go.

    Raises:
        CheckpointError: A missing, extra, misshapen or mistyped tensor, a value
            that is not finite, or a broken file.
    """
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        drafter = Drafter(config).to(getattr(torch, config.dtype))
    tensors = _read_tensors(folder / WEIGHTS_FILE, drafter.state_dict())
    _require_draft_vocab_valid(folder, config, tensors)
    drafter.to_empty(device="cpu")
    for parameter in drafter.parameters():
        # A weight that loading forgot would show as NaN, not as garbage.
        torch.nn.init.constant_(parameter, float("nan"))
    drafter.load_state_dict(tensors, strict=True)
    drafter = drafter.to(device=device, dtype=dtype).eval().requires_grad_(False)
    _require_finite(folder, drafter)  # also of what the conversion made
    return drafter


def _as_stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In the checkpoint's type, also after training in another one."""
    stored = tensor.detach().cpu().contiguous()
    return stored.to(dtype) if stored.is_floating_point() else stored


def _read_text(path: Path) -> str:
    _require_file(
        path,
        f"A drafter's folder holds {CONFIG_FILE} and {WEIGHTS_FILE}; make one with "
        "`vllm-mtp init`.",
    )
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CONFIG_BYTES + 1)
            size = max(len(data), os.fstat(file.fileno()).st_size)
        if size > _MAX_CONFIG_BYTES:
            raise CheckpointError(
                f"{path}: {size} bytes, expected at most {_MAX_CONFIG_BYTES}; this is "
                "not a drafter's config."
            )
        if (commas := data.count(b",")) > _MAX_CONFIG_VALUES:
            raise CheckpointError(
                f"{path}: about {commas} values, expected at most "
                f"{_MAX_CONFIG_VALUES}; this is not a drafter's config."
            )
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def _require_file(path: Path, advice: str) -> None:
    """Before it is opened: to open a pipe would wait for ever."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such file. {advice}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}. {advice}") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a file but a folder or device. {advice}")


def _listed(problems: Iterable[str]) -> str:
    lines = list(problems)
    left = len(lines) - _MAX_PROBLEMS
    more = [f"  and {left} more"] if left > 0 else []
    return "\n".join([*lines[:_MAX_PROBLEMS], *more])


def _explanations(error: ValidationError) -> list[str]:
    items = error.errors()
    if len(items) > 1:
        # One bad layer also makes the list of layers too short; say it once.
        items = [item for item in items if item["type"] != "too_short"] or items
    return [_explain(item) for item in items]


def _explain(item: Mapping[str, Any]) -> str:
    # A layer's kind is part of pydantic's path, but not of the file's.
    parts = [part for part in item["loc"] if part not in ("shared", "own", "mlp")]
    where = _short(".".join(map(str, parts))) or "config"
    said = _short(str(item["msg"]), 200)  # may hold what was got
    if item["type"] == "missing":
        return f"  {where}: missing; add it"
    if item["type"] == "extra_forbidden":
        return f"  {where}: unknown key (got {_short(str(item['input']))}); remove it"
    if item["type"] == "value_error":
        return f"  {said.removeprefix('Value error, ')}"
    return f"  {where}: got {_short(str(item['input']))!r}; {said}"


def _read_tensors(
    path: Path, expected: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    _require_file(
        path,
        "Only safetensors weights are read (no pickle); save the drafter again with "
        "`vllm_mtp.save_drafter`.",
    )
    try:
        with safe_open(path, framework="pt") as file:
            _require_named_once(path)
            _require_same_tensors(path, file, expected)
            return {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); copy or download the "
            "drafter again"
        ) from None


def _require_named_once(path: Path) -> None:
    """Of two entries for one tensor, safetensors takes one without a word."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    try:
        json.loads(header, object_pairs_hook=_named_once)
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is broken: {error}") from None


def _require_same_tensors(
    path: Path, file: safe_open, expected: Mapping[str, torch.Tensor]
) -> None:
    found = set(file.keys())
    missing, unknown = sorted(set(expected) - found), sorted(found - set(expected))
    problems = [f"missing tensor {name!r}" for name in missing]
    problems += [f"unknown tensor {_short(name)!r}" for name in unknown]
    for name in sorted(found & set(expected)):
        got, want = file.get_slice(name), expected[name]
        want_dtype = _DTYPE_NAMES[str(want.dtype).removeprefix("torch.")]
        if got.get_shape() != list(want.shape):
            problems.append(
                f"tensor {name!r} has shape {got.get_shape()}, expected "
                f"{list(want.shape)}"
            )
        elif got.get_dtype() != want_dtype:
            problems.append(
                f"tensor {name!r} has type {got.get_dtype()}, expected {want_dtype}"
            )
    if problems:
        raise CheckpointError(
            f"{path}: does not fit its {CONFIG_FILE}:\n"
            + _listed(f"  {problem}" for problem in problems)
            + "\nConfig and weights must come from the same save; copy or train the "
            "drafter again."
        )


def _require_draft_vocab_valid(
    folder: Path, config: DrafterConfig, tensors: Mapping[str, torch.Tensor]
) -> None:
    ids = tensors.get("draft_vocab.token_ids")
    if ids is None:
        return
    vocab = config.target.vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= vocab or len(ids.unique()) != len(ids):
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: tensor 'draft_vocab.token_ids' must hold "
            f"different token ids from 0 to {vocab - 1}; got {len(ids.unique())} "
            f"different ones of {len(ids)}, from {int(ids.min())} to {int(ids.max())}. "
            "Make the drafter again."
        )


def _require_finite(folder: Path, drafter: Drafter) -> None:
    bad = [
        f"{name!r} ({int((~weight.isfinite()).sum())} of {weight.numel()} values)"
        for name, weight in drafter.named_parameters()
        if not weight.isfinite().all()
    ]
    if bad:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: NaN or infinite values in "
            f"{', '.join(bad[:_MAX_PROBLEMS])}; the training run diverged, the file is "
            "damaged, or the values are too large for the type that was asked for. "
            "Use another save."
        )
