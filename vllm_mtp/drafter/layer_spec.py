# SPDX-License-Identifier: Apache-2.0
"""The short text that lists a drafter's layers, as in ``shared:0-9,own:28,29``.

``mlp:2`` are two layers without attention, which no target layer belongs to.
"""

import re
from typing import Literal, NamedTuple

from vllm_mtp.drafter.config import MAX_LAYERS
from vllm_mtp.errors import LayerSpecError

_ITEM = re.compile(
    r"(?:(?P<kind>shared|own|mlp):)?(?:(?P<all>all)|(?P<first>\d+)(?:-(?P<last>\d+))?)"
)
EXAMPLES = "'shared:all', 'own:0,7,14', 'shared:0-9,own:28,29' or 'mlp:2'"
_HELP = f"expected something like {EXAMPLES}"


class ListedLayer(NamedTuple):
    """One draft layer: its kind, and the target layer that it is bound to."""

    kind: Literal["shared", "own", "mlp"]
    target_layer: int | None


def parse_layers(spec: str, num_target_layers: int) -> list[ListedLayer]:
    """Read a layer list.

    A kind holds until the next one is named; ``a-b`` includes both ends.

    Args:
        spec: The text, such as ``shared:0-9,own:28,29``.
        num_target_layers: How many layers the target has.

    Raises:
        LayerSpecError: The text cannot be read or names a layer out of range.
    """
    layers: list[ListedLayer] = []
    kind: str | None = None
    for item in spec.replace(" ", "").split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise LayerSpecError(f"--layers {spec!r}: cannot read {item!r}; {_HELP}")
        kind = match["kind"] or kind
        if kind is None:
            raise LayerSpecError(
                f"--layers {spec!r}: {item!r} stands before any kind; {_HELP}"
            )
        if kind == "mlp":
            layers += [ListedLayer("mlp", None)] * _count(match, spec)
            continue
        indices = _indices(match, num_target_layers, spec)
        layers += [ListedLayer(kind, index) for index in indices]  # type: ignore[arg-type]
    return layers


def _count(match: re.Match[str], spec: str) -> int:
    count = 0 if match["all"] or match["last"] else int(match["first"])
    if not 1 <= count <= MAX_LAYERS:
        raise LayerSpecError(
            f"--layers {spec!r}: {match[0]!r} is no number of layers; expected "
            f"something like mlp:2, at most {MAX_LAYERS}"
        )
    return count


def _indices(match: re.Match[str], num_target_layers: int, spec: str) -> range:
    if match["all"]:
        return range(num_target_layers)
    first = int(match["first"])
    last = int(match["last"] or first)
    if not first <= last < num_target_layers:
        raise LayerSpecError(
            f"--layers {spec!r}: {match[0]!r} is out of range; the target has "
            f"layers 0 to {num_target_layers - 1}, and a range goes upwards"
        )
    return range(first, last + 1)
