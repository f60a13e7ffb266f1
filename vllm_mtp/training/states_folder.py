# SPDX-License-Identifier: Apache-2.0
"""The target's states of texts on disk, for runs that read the same texts.

To encode the texts is a third of a training step's work (`arm-kv-hidden` of
examples/systems: 1.6 of 4.9 seconds of one core), and runs that are to be compared read
the same ones. A file per text holds the layers that some run has asked for; a run that
asks for others adds them. Each token takes the last hidden state, and keys and values
of each layer that is read (6.5 kB for seven layers of SmolLM2-135M in bfloat16).
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_mtp.files import writing
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.target_states import TargetStates

_HIDDEN = "hidden"


class StatesFolder:
    """Reads and writes states of one target.

    Args:
        folder: Several targets may share it: each has a folder of its own in it.
        host: The target.

    Raises:
        OutputError: The folder cannot be written to.
    """

    def __init__(self, folder: Path, host: HFTarget) -> None:
        self._host = host
        self._folder = folder / _fingerprint(host)
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)

    def states(
        self,
        token_ids: torch.Tensor,
        cached: Collection[int],
        streams: Collection[int],
    ) -> TargetStates:
        """The states of one text, encoded where they are not there.

        Args:
            token_ids: ``[T]`` int64.
            cached: Layers whose keys and values are wanted.
            streams: Layers whose output is wanted.

        Raises:
            OutputError: They cannot be written.
        """
        path = self._folder / f"{_name(token_ids)}.safetensors"
        wanted = {_HIDDEN, *_names(cached, streams)}
        # Another process may write it anew: what is open stays as it is.
        there, found = _read(path, wanted, str(token_ids.device))
        if not wanted <= there:
            # What other runs have asked for stays.
            kept = _layers(there, "keys"), _layers(there, "streams")
            states = self._host.encode(
                token_ids,
                cached=kept[0].union(cached),
                streams=kept[1].union(streams),
            )
            found = _by_name(states)
            self._write(path, found)
        return TargetStates(
            {i: found[f"keys.{i}"] for i in sorted(cached)},
            {i: found[f"values.{i}"] for i in sorted(cached)},
            found[_HIDDEN],
            {i: found[f"streams.{i}"] for i in sorted(streams)},
        )

    def _write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        # Another process may write the same text: each has a name of its own.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with writing(path):
            try:
                save_file({n: t.contiguous() for n, t in tensors.items()}, temporary)
                os.replace(temporary, path)
            except (OSError, SafetensorError):
                temporary.unlink(missing_ok=True)
                raise


def _names(cached: Iterable[int], streams: Iterable[int]) -> set[str]:
    keys = {f"keys.{i}" for i in cached}
    values = {f"values.{i}" for i in cached}
    return keys | values | {f"streams.{i}" for i in streams}


def _layers(names: Iterable[str], kind: str) -> set[int]:
    found = (name.split(".") for name in names if name.startswith(f"{kind}."))
    return {int(number) for _, number in found}


def _by_name(states: TargetStates) -> dict[str, torch.Tensor]:
    tensors = {_HIDDEN: states.hidden}
    for kind in ("keys", "values", "streams"):
        for index, tensor in getattr(states, kind).items():
            tensors[f"{kind}.{index}"] = tensor
    return tensors


def _read(
    path: Path, wanted: set[str], device: str
) -> tuple[set[str], dict[str, torch.Tensor]]:
    """The names of a file's tensors, none where it is missing or broken, and what is
    wanted if all of it is there."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            names = set(file.keys())
            whole = wanted if wanted <= names else ()
            return names, {name: file.get_tensor(name) for name in whole}
    except (OSError, SafetensorError):
        return set(), {}


def _name(token_ids: torch.Tensor) -> str:
    return hashlib.sha256(token_ids.cpu().numpy().tobytes()).hexdigest()[:32]


@torch.no_grad()
def _fingerprint(host: HFTarget) -> str:
    """Of all that states depend on: config, weights (a few numbers of each), types,
    device.

    A target that was trained further has other numbers, and one whose RoPE was
    stretched another config.
    """
    digest = hashlib.sha256()
    device = host.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    config = host.model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    config_text = json.dumps(config, sort_keys=True, default=str)
    digest.update(f"{device} {autocast} {config_text}".encode())
    # What packed weights consist of are buffers; those that are not saved, such as of
    # RoPE, follow from the config.
    saved = set(host.model.state_dict())
    buffers = ((n, b) for n, b in host.model.named_buffers() if n in saved)
    for name, weight in chain(host.model.named_parameters(), buffers):
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        some = weight.flatten()[:: max(1, weight.numel() // 64)].float().cpu()
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]
