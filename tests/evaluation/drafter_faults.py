# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with drafters between training and serving, done on purpose.

Each fault leaves a drafter that loads and serves without an error.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file


class Fault(NamedTuple):
    """A fault of the drafter ``shared:0,own:1,2`` on a tiny Llama.

    Attributes:
        make: Damages a drafter's folder or its target's.
        found: Where each level parts first.
    """

    make: Callable[[Path, Path], None]
    found: dict[str, str]


def swap_layers(drafter: Path, target: Path) -> None:
    """Two layers' weights change places."""
    path = drafter / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.startswith("layers.1.")]:
        other = name.replace("layers.1.", "layers.2.")
        tensors[name], tensors[other] = tensors[other], tensors[name]
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def bind_one_off(drafter: Path, target: Path) -> None:
    """The last layer reads the next target layer's cache."""
    _edit(drafter, lambda config: config["layers"][2].update(target_layer=3))


def change_rope(drafter: Path, target: Path) -> None:
    """Another target, and the drafter's config edited to match."""
    rope = {"rope_type": "default", "rope_theta": 11000.0}
    _edit(target, lambda config: config.update(rope_parameters=rope))
    _edit(drafter, lambda config: config["target"].update(rope_parameters=rope))


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    change(config)
    path.write_text(json.dumps(config), "utf-8")


FAULTS = {
    "two layers swapped": Fault(
        swap_layers,
        {
            "files": "tensor layers.1.input_norm.weight",
            "torch": "layer 1 (own, target layer 1)",
        },
    ),
    "binding off by one": Fault(
        bind_one_off,
        {
            "files": "config key layers.2.target_layer",
            "torch": "layer 2 (own, target layer 3)",
        },
    ),
    "RoPE changed": Fault(
        change_rope,
        {
            "files": "config key target.rope_parameters.rope_theta",
            "target": "keys of target layer 0",
            "torch": "layer 0 (shared, target layer 0)",
        },
    ),
}
