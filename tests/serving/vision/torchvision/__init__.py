# SPDX-License-Identifier: Apache-2.0
"""The installed torchvision, beside a CPU build of torch.

Its wheel on PyPI is a CUDA build, whose operators do not load here. Importing it asks
for the schemas of two of them, and nothing that these tests use runs one. On the path
of every process, since vLLM looks at models in processes of its own.
"""

import importlib.machinery
import sys
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent.parent
_spec = importlib.machinery.PathFinder.find_spec(
    "torchvision", [p for p in sys.path if Path(p or ".").resolve() != _HERE]
)
assert _spec is not None, "`make setup` installs it"
assert _spec.origin is not None
_library = torch.library.Library("torchvision", "DEF")
_library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
__path__ = list(_spec.submodule_search_locations or ())
__file__ = _spec.origin
exec(compile(Path(_spec.origin).read_text("utf-8"), _spec.origin, "exec"))
