# SPDX-License-Identifier: Apache-2.0
"""The probe: what the trainer's drafter computed, kept beside its weights.

A drafter that is served wrongly is only slow: the target corrects every draft, so
the text stays right. And a wrong folder is wrong in training and serving alike. So
training leaves a few blocks and what it computed for them, in ``probe.safetensors``
of the drafter's folder, and ``vllm-mtp check`` compares. Nothing else reads the file.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.errors import CheckpointError, in_one_line
from vllm_mtp.evaluation.blocks import (
    MAX_TEXT_TOKENS,
    Outcome,
    ProbeTexts,
    TorchRun,
    choose_texts,
    run_in_torch,
)
from vllm_mtp.files import writing

PROBE_FILE = "probe.safetensors"
_FORMAT = "vllm-mtp probe 1"
# Types by how much they round, the finest first.
PRECISIONS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Probe:
    """What was probed, and what the drafter computed then.

    Attributes:
        texts: The blocks.
        run: What drafter and target computed for them.
        dtype: Coarsest type of the computation.
        config: The drafter's config, flat: ``{"layers.0.target_layer": 3, ..}``.
        checksums: SHA-256 of every stored tensor, the first 32 hex digits.
        versions: Of torch, transformers and vllm-mtp.
    """

    texts: ProbeTexts
    run: TorchRun
    dtype: str
    config: dict[str, Any]
    checksums: dict[str, str]
    versions: dict[str, str]


def write_probe(
    folder: Path | str, bound: BoundDrafter, rows: Iterable[Mapping[str, Any]]
) -> Path:
    """Probe a drafter and keep the result in its folder.

    Call it right after training, with the drafter that was trained still in memory:
    what is computed here is what serving is held against. Call it under the same
    autocast as training, if any.

    Args:
        folder: The drafter's, which `save_drafter` wrote or will write.
        bound: The trained drafter on its `HFTarget`.
        rows: A handful of texts, best held out, four are used: ``input_ids`` (token
            ids) and, if known, ``loss_spans`` (list of ``[start, end)`` of the
            target's own tokens; anchors are chosen there).

    Returns:
        The file.

    Raises:
        MTPError: No row has three tokens or more.
    """
    probe = make_probe(bound, texts_for(bound, rows))
    return _save(probe, Path(folder))


def texts_for(bound: BoundDrafter, rows: Iterable[Mapping[str, Any]]) -> ProbeTexts:
    """Choose the blocks to probe; ``rows`` as for `write_probe`."""
    model: Any = bound.target.model  # type: ignore[attr-defined]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return choose_texts(rows, bound.drafter.config, longest or MAX_TEXT_TOKENS)


def make_probe(bound: BoundDrafter, texts: ProbeTexts) -> Probe:
    """Probe a drafter in plain torch."""
    drafter = bound.drafter
    return Probe(
        texts,
        run_in_torch(bound, texts),
        _precision(bound),
        flat_config(drafter.config),
        checksums(_stored(drafter)),
        {name: version(name) for name in ("torch", "transformers", "vllm-mtp")},
    )


def read_probe(folder: Path | str) -> Probe | None:
    """The probe of a drafter's folder, or None where it has none.

    Raises:
        CheckpointError: The file is broken or of another version.
    """
    path = Path(folder, PROBE_FILE)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (found := metadata.get("format")) != _FORMAT:
            raise CheckpointError(
                f"{path}: got format {found!r}, expected {_FORMAT!r}. Update vllm-mtp, "
                "or record the probe again with the trained drafter"
            )
        return _parsed(tensors, metadata)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: not a whole probe ({in_one_line(error)}); copy the drafter again"
        ) from None


def flat_config(config: DrafterConfig, *, with_defaults: bool = True) -> dict[str, Any]:
    """What the config says of the drafter, one entry per key."""
    content = config.model_dump(mode="json", exclude_defaults=not with_defaults)
    for informative in ("name", "weights_fingerprint"):
        content["target"].pop(informative, None)
    return dict(_flatten(content, ""))


def _flatten(value: Any, prefix: str) -> Iterable[tuple[str, Any]]:
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        yield prefix.removesuffix("."), value
        return
    for key, item in items:
        yield from _flatten(item, f"{prefix}{key}.")


def checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """SHA-256 over type, shape and bytes of each tensor, the first 32 hex digits."""
    found = {}
    for name, tensor in tensors.items():
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.contiguous().flatten().view(torch.uint8)
        digest.update(flat.numpy().data)
        found[name] = digest.hexdigest()[:32]
    return found


def coarsest(*dtypes: str) -> str:
    """The one of these types that rounds most."""
    return max(dtypes, key=PRECISIONS.index)


def _stored(drafter: Drafter) -> dict[str, torch.Tensor]:
    """The tensors in the type in which a checkpoint holds them."""
    dtype = getattr(torch, drafter.config.dtype)
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu()
        for name, tensor in drafter.state_dict().items()
    }


def _precision(bound: BoundDrafter) -> str:
    model: Any = bound.target.model  # type: ignore[attr-defined]
    dtypes = [model.dtype]
    if torch.is_autocast_enabled(model.device.type):
        dtypes.append(torch.get_autocast_dtype(model.device.type))
    return coarsest(*(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _save(probe: Probe, folder: Path) -> Path:
    """Write the file whole, beside its place first."""
    with writing(folder / PROBE_FILE):
        _write(probe, folder)
    return folder / PROBE_FILE


def _write(probe: Probe, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        path = Path(scratch, PROBE_FILE)
        save_file(_tensors(probe), path, metadata=_metadata(probe))
        plain = Path(scratch, "mode")
        plain.touch()
        shutil.copymode(plain, path)  # safetensors lets only the owner read
        os.replace(path, folder / PROBE_FILE)


def _tensors(probe: Probe) -> dict[str, torch.Tensor]:
    texts, run = probe.texts, probe.run

    def integers(numbers: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(numbers), dtype=torch.int32)

    return {
        "token_ids": integers(t for ids in texts.token_ids for t in ids),
        "text_lens": integers(map(len, texts.token_ids)),
        "prefix_lens": integers(n for lens in texts.prefix_lens for n in lens),
        "blocks_per_text": integers(map(len, texts.prefix_lens)),
        "stages": torch.stack(list(run.outcome.stages.values())),
        "states": torch.stack(list(run.states.values())),
        "drafts": run.outcome.drafts.int(),
        "gaps": run.gaps.contiguous(),
    }


def _metadata(probe: Probe) -> dict[str, str]:
    content = {
        "stages": list(probe.run.outcome.stages),
        "states": list(probe.run.states),
        "config": probe.config,
        "checksums": probe.checksums,
        "versions": probe.versions,
    }
    as_json = {key: json.dumps(value) for key, value in content.items()}
    return {"format": _FORMAT, "dtype": probe.dtype, **as_json}


def _parsed(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Probe:
    def named(key: str) -> dict[str, torch.Tensor]:
        return dict(zip(json.loads(metadata[key]), tensors[key], strict=True))

    def parts(key: str, lengths: str) -> tuple[tuple[int, ...], ...]:
        split = tensors[key].split(tensors[lengths].tolist())
        return tuple(tuple(part.tolist()) for part in split)

    if metadata["dtype"] not in PRECISIONS:
        raise ValueError(f"unknown type {metadata['dtype']!r}")
    outcome = Outcome(named("stages"), tensors["drafts"].long())
    return Probe(
        ProbeTexts(
            parts("token_ids", "text_lens"), parts("prefix_lens", "blocks_per_text")
        ),
        TorchRun(outcome, named("states"), tensors["gaps"]),
        metadata["dtype"],
        json.loads(metadata["config"]),
        json.loads(metadata["checksums"]),
        json.loads(metadata["versions"]),
    )
