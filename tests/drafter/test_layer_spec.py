# SPDX-License-Identifier: Apache-2.0
"""The text that lists a drafter's layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mtp.drafter.layer_spec import parse_layers
from vllm_mtp.errors import LayerSpecError

NUM_LAYERS = 30


def _layers(kind: str, *indices: int) -> list[tuple[str, int]]:
    return [(kind, index) for index in indices]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("shared:all", _layers("shared", *range(30))),
        ("own:all", _layers("own", *range(30))),
        ("own:0,7,14", _layers("own", 0, 7, 14)),
        ("shared:0-2", _layers("shared", 0, 1, 2)),
        ("shared:5-5", _layers("shared", 5)),
        ("shared:0-1,own:28,29", _layers("shared", 0, 1) + _layers("own", 28, 29)),
        # The order is the order they run in, and a layer may be read twice.
        ("own:9,3,9", _layers("own", 9, 3, 9)),
        ("own:1,shared:2,own:3", [("own", 1), ("shared", 2), ("own", 3)]),
        (" shared : 0 - 1 , own : 2 ", _layers("shared", 0, 1) + _layers("own", 2)),
        ("mlp:2", [("mlp", None)] * 2),
        # A number of layers, and no target layer: it may be larger than those.
        ("mlp:40", [("mlp", None)] * 40),
        ("mlp:1,2,own:3", [*[("mlp", None)] * 3, ("own", 3)]),
        ("own:3,mlp:1,shared:0", [("own", 3), ("mlp", None), ("shared", 0)]),
    ],
)
def test_reads(spec: str, expected: list[tuple[str, int]]) -> None:
    assert parse_layers(spec, NUM_LAYERS) == expected


@given(
    st.lists(
        st.tuples(st.sampled_from(["shared", "own"]), st.integers(0, NUM_LAYERS - 1)),
        min_size=1,
    )
)
def test_reads_back_what_is_listed_one_by_one(layers: list[tuple[str, int]]) -> None:
    spec = ",".join(f"{kind}:{index}" for kind, index in layers)
    assert parse_layers(spec, NUM_LAYERS) == layers


@pytest.mark.parametrize(
    ("spec", "item"),
    [
        ("", "''"),
        ("shared:", "'shared:'"),
        ("shared:1,,2", "''"),
        ("shared:1,", "''"),
        ("both:1", "'both:1'"),
        ("Shared:1", "'Shared:1'"),
        ("shared:-1", "'shared:-1'"),
        ("shared:1-2-3", "'shared:1-2-3'"),
        ("shared:1.5", "'shared:1.5'"),
        ("shared:all-3", "'shared:all-3'"),
        ("shared:0;own:1", "'shared:0;own:1'"),
    ],
)
def test_unreadable_items_are_named(spec: str, item: str) -> None:
    with pytest.raises(LayerSpecError) as caught:
        parse_layers(spec, NUM_LAYERS)
    assert f"--layers {spec!r}: cannot read {item};" in str(caught.value)
    assert "'shared:0-9,own:28,29'" in str(caught.value)  # what would be right


@pytest.mark.parametrize("item", ["mlp:0", "mlp:all", "mlp:1-2", "mlp:513"])
def test_mlp_layers_are_a_number(item: str) -> None:
    with pytest.raises(LayerSpecError) as caught:
        parse_layers(f"own:1,{item}", NUM_LAYERS)
    assert f"{item!r} is no number of layers; expected something like mlp:2" in str(
        caught.value
    )


@pytest.mark.parametrize("spec", ["3", "all", "0-3,own:4"])
def test_a_layer_before_any_kind_is_refused(spec: str) -> None:
    with pytest.raises(LayerSpecError, match="stands before any kind"):
        parse_layers(spec, NUM_LAYERS)


@pytest.mark.parametrize(
    ("spec", "item"),
    [("own:30", "own:30"), ("own:1,28-30", "28-30"), ("own:5-3", "own:5-3")],
)
def test_layers_out_of_range_are_refused(spec: str, item: str) -> None:
    with pytest.raises(LayerSpecError) as caught:
        parse_layers(spec, NUM_LAYERS)
    assert f"{item!r} is out of range; the target has layers 0 to 29" in str(
        caught.value
    )
