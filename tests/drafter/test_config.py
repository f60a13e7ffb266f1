# SPDX-License-Identifier: Apache-2.0
"""`DrafterConfig` takes what the format says, and nothing else."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_mtp.drafter.checkpoint import CONFIG_FILE, read_config
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.errors import CheckpointError

VALID: dict[str, Any] = {
    "model_type": "mtp_placeholder",
    "format_version": 1,
    "num_speculative_tokens": 4,
    "layers": [
        {
            "kind": "shared",
            "target_layer": 3,
            "lora": {"rank": 8, "alpha": 16.0, "modules": ["q_proj", "o_proj"]},
            "full_rank": ["k_proj"],
        },
        {
            "kind": "own",
            "target_layer": 1,
            "intermediate_size": 24,
            "rms_norm_eps": 1e-5,
            "norm": "layer",
            "norm_placement": "around",
            "parallel": False,
            "qkv_bias": False,
            "o_bias": True,
            "qk_norm": True,
            "qk_norm_whole": False,
            "qk_norm_after_rope": False,
            "v_norm": True,
            "output_gate": True,
            "activation": "gelu_tanh",
            "output_scale": True,
            "boundary_hidden": True,
            "boundary_of": "last",
            "bridge": True,
            "attention": "block",
            "per_position": False,
        },
        {"kind": "shared", "target_layer": 1, "lora": None, "full_rank": []},
        {
            "kind": "mlp",
            "form": "square",
            "intermediate_size": None,
            "rms_norm_eps": None,
            "per_position": False,
        },
    ],
    "markov": {"rank": 4},
    "noise": {"low": 1, "high": 32, "token_ids": [31, 7, 7]},
    "chain": None,
    "input": "block",
    "block_mask": "bidirectional",
    "lm_head": "target",
    "extra_rows": 2,
    "boundary_layers": [],
    "draft_vocab_size": 16,
    "prefix_window": 256,
    "dtype": "bfloat16",
    "target": {
        "name": "tiny",
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "layer_heads": None,
        "cached_layers": [0, 1, 2, 3],
        "vocab_size": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "weights_fingerprint": "00ff",
    },
}
OPTIONAL = {
    ("layers", 0, "lora"): None,
    ("layers", 0, "full_rank"): (),
    ("layers", 1, "norm"): "rms",
    ("layers", 1, "norm_placement"): "before",
    ("layers", 1, "parallel"): False,
    ("layers", 1, "qkv_bias"): False,
    ("layers", 1, "o_bias"): False,
    ("layers", 1, "qk_norm"): False,
    ("layers", 1, "qk_norm_whole"): False,
    ("layers", 1, "qk_norm_after_rope"): False,
    ("layers", 1, "v_norm"): False,
    ("layers", 1, "output_gate"): False,
    ("layers", 1, "activation"): "silu",
    ("layers", 1, "output_scale"): False,
    ("layers", 1, "boundary_hidden"): False,
    ("layers", 1, "boundary_of"): "last",
    ("layers", 1, "bridge"): False,
    ("layers", 1, "attention"): "prefix",
    ("layers", 1, "per_position"): False,
    ("layers", 2, "lora"): None,
    ("layers", 2, "full_rank"): (),
    ("layers", 3, "intermediate_size"): None,
    ("layers", 3, "rms_norm_eps"): None,
    ("layers", 3, "per_position"): False,
    ("markov",): None,
    ("noise",): None,
    ("chain",): None,
    ("input",): "block",
    ("block_mask",): "causal",
    ("lm_head",): "target",
    ("extra_rows",): 0,
    ("boundary_layers",): (),
    ("draft_vocab_size",): None,
    ("prefix_window",): None,
    ("target", "name"): None,
    ("target", "intermediate_size"): None,
    ("target", "layer_heads"): None,
    ("target", "cached_layers"): None,
    ("target", "weights_fingerprint"): None,
}
FREE = ("target", "rope_parameters")  # whatever the target's config holds

KeyPath = tuple[str | int, ...]


def _walk(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every object, list and leaf of the valid config with its path."""
    yield path, value
    if path == FREE:
        return
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, child in items:
        yield from _walk(child, (*path, key))


def changed(
    path: KeyPath, value: Any = None, *, remove: bool = False
) -> dict[str, Any]:
    config = copy.deepcopy(VALID)
    at: Any = config
    for key in path[:-1]:
        at = at[key]
    if remove:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return config


def _read(folder: Path, config: Any) -> DrafterConfig:
    (folder / CONFIG_FILE).write_text(json.dumps(config), "utf-8")
    return read_config(folder)


def _message(folder: Path, config: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        _read(folder, config)
    return str(caught.value)


KEYS = [path for path, _ in _walk(VALID) if path and isinstance(path[-1], str)]
OBJECTS = [
    path for path, value in _walk(VALID) if isinstance(value, dict) and path != FREE
]
LEAVES = [
    (path, value)
    for path, value in _walk(VALID)
    if isinstance(value, bool | int | float | str)
    and path
    # A literal is compared by value: 1.0 and true are version 1 as well.
    and path != ("format_version",)
]


def path_id(value: Any) -> str:
    return ".".join(map(str, value)) if isinstance(value, tuple) else repr(value)


def test_valid_config_is_read_as_it_stands(tmp_path: Path) -> None:
    config = _read(tmp_path, VALID)
    assert json.loads(config.model_dump_json()) == VALID
    assert config.bound_layers == (1, 3)
    assert config.uses_boundary_hidden


def test_boundary_hidden_is_used_only_where_a_layer_reads_it(tmp_path: Path) -> None:
    config = _read(tmp_path, changed(("layers", 1, "boundary_hidden"), False))
    assert not config.uses_boundary_hidden


def test_a_config_cannot_be_changed(tmp_path: Path) -> None:
    config = _read(tmp_path, VALID)
    with pytest.raises(ValidationError, match="frozen"):
        config.num_speculative_tokens = 5  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.target.vocab_size = 5  # type: ignore[misc]


@pytest.mark.parametrize("path", OBJECTS, ids=path_id)
def test_unknown_keys_are_refused_everywhere(tmp_path: Path, path: KeyPath) -> None:
    message = _message(tmp_path, changed((*path, "surprise"), 7))
    assert "surprise: unknown key (got 7); remove it" in message


@pytest.mark.parametrize("path", [p for p in KEYS if p not in OPTIONAL], ids=path_id)
def test_missing_keys_are_named(tmp_path: Path, path: KeyPath) -> None:
    message = _message(tmp_path, changed(path, remove=True))
    # Of `kind` the reader can only say that it cannot tell the layer's kind.
    assert f"{path[-1]}: missing; add it" in message or (
        path[-1] == "kind" and "using discriminator 'kind'" in message
    )


@pytest.mark.parametrize("path", OPTIONAL, ids=path_id)
def test_optional_keys_have_defaults(tmp_path: Path, path: KeyPath) -> None:
    at: Any = _read(tmp_path, changed(path, remove=True))
    for key in path:
        at = at[key] if isinstance(key, int) else getattr(at, key)
    assert at == OPTIONAL[path]


def _wrong_types(value: Any) -> list[Any]:
    """Values of other types, among them those that a lax reader would convert."""
    if isinstance(value, bool):
        return [str(value).lower(), int(value)]
    if isinstance(value, int):
        return [str(value), float(value), value + 0.5, True]
    if isinstance(value, float):
        return [str(value), True]
    return [7, ["q_proj"]]


@pytest.mark.parametrize(
    ("path", "wrong"),
    [(path, wrong) for path, value in LEAVES for wrong in _wrong_types(value)],
    ids=path_id,
)
def test_other_types_are_not_converted(
    tmp_path: Path, path: KeyPath, wrong: Any
) -> None:
    message = _message(tmp_path, changed(path, wrong))
    assert str(wrong) in message
    name = path[-2] if isinstance(path[-1], int) else path[-1]
    assert str(name) in message


@pytest.mark.parametrize(
    ("path", "wrong", "expected"),
    [
        (("model_type",), "llama", "'mtp_placeholder'"),
        (("format_version",), 2, "should be 1"),
        (("num_speculative_tokens",), 0, "greater than or equal to 1"),
        (("num_speculative_tokens",), 65, "less than or equal to 64"),
        (("layers",), [], "at least 1"),
        (("layers", 0, "kind"), "borrowed", "'shared', 'own'"),
        (("layers", 0, "target_layer"), -1, "greater than or equal to 0"),
        (("layers", 0, "lora", "rank"), 0, "greater than or equal to 1"),
        (("layers", 0, "lora", "alpha"), 0, "greater than 0"),
        (("layers", 0, "lora", "modules"), [], "at least 1"),
        (("layers", 0, "lora", "modules", 0), "lm_head", "'q_proj', 'k_proj'"),
        (("layers", 1, "intermediate_size"), 0, "greater than or equal to 1"),
        (("layers", 1, "rms_norm_eps"), 0.0, "greater than 0"),
        (("markov", "rank"), 0, "greater than or equal to 1"),
        (("noise", "low"), -1, "greater than or equal to 0"),
        (("layers", 3, "form"), "round", "'gated', 'plain' or 'square'"),
        (("layers", 1, "attention"), "all", "'prefix' or 'block'"),
        (("layers", 1, "boundary_of"), "first", "'last' or 'bound'"),
        (("input",), "token", "'block' or 'boundary'"),
        (("block_mask",), "none", "'causal' or 'bidirectional'"),
        (("lm_head",), "tied", "'target' or 'own'"),
        (("extra_rows",), -1, "greater than or equal to 0"),
        (("extra_rows",), 65, "less than or equal to 64"),
        (("draft_vocab_size",), 0, "greater than or equal to 1"),
        (("prefix_window",), 0, "greater than or equal to 1"),
        (("prefix_window",), 64.0, "valid integer"),
        (("dtype",), "float64", "'bfloat16', 'float16' or 'float32'"),
        (("target", "num_hidden_layers"), 0, "greater than or equal to 1"),
        (("target", "head_dim"), 0, "greater than or equal to 1"),
    ],
    ids=path_id,
)
def test_values_out_of_range_are_named(
    tmp_path: Path, path: KeyPath, wrong: Any, expected: str
) -> None:
    message = _message(tmp_path, changed(path, wrong))
    assert f"{wrong!r}" in message
    assert expected in message


def test_the_ends_of_the_ranges_are_allowed(tmp_path: Path) -> None:
    for positions in (1, 64):
        config = changed(("num_speculative_tokens",), positions)
        config = _read(tmp_path, config | {"noise": None})
        assert config.num_speculative_tokens == positions
    assert _read(tmp_path, changed(("draft_vocab_size",), 32)).draft_vocab_size == 32


def test_layers_must_be_in_the_target(tmp_path: Path) -> None:
    message = _message(tmp_path, changed(("layers", 1, "target_layer"), 4))
    assert "layers.1.target_layer: got 4, the target has layers 0 to 3" in message


def test_draft_vocabulary_is_no_larger_than_the_targets(tmp_path: Path) -> None:
    message = _message(tmp_path, changed(("draft_vocab_size",), 33))
    assert "draft_vocab_size: got 33, the target's vocabulary has 32" in message


@pytest.mark.parametrize(
    ("path", "wrong", "expected"),
    [
        (("noise", "low"), 32, "noise.low: got 32, expected less than high (32)"),
        (("noise", "token_ids", 1), 0, "noise.token_ids: got 0, expected 1 to 31"),
        (("noise", "token_ids", 1), 32, "noise.token_ids: got 32, expected 1 to 31"),
        (("noise", "token_ids"), [3], "noise.token_ids: got 1 ids, expected 3"),
        (("noise", "high"), 33, "noise.high: got 33, the target's vocabulary has 32"),
    ],
    ids=path_id,
)
def test_noise_tokens_are_the_targets_and_one_for_each_placeholder(
    tmp_path: Path, path: KeyPath, wrong: Any, expected: str
) -> None:
    assert expected in _message(tmp_path, changed(path, wrong))


_CHAIN = {"rms_norm_eps": 1e-5}
_MLP = {"kind": "mlp", "form": "square"}
_OWN = {
    "kind": "own",
    "target_layer": 1,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
}
_SHARED = {"kind": "shared", "target_layer": 0}
_PLAIN: dict[str, Any] = {
    key: VALID[key] for key in ("model_type", "format_version", "dtype", "target")
} | {"num_speculative_tokens": 3, "layers": [_OWN]}


def _layers(*layers: dict[str, Any]) -> dict[str, Any]:
    return {"layers": list(layers)}


# Sound drafters; each row below is one of them with one key too many.
HEADS = _layers(_MLP | {"per_position": True}) | {"input": "boundary"}
CHAIN = {"chain": _CHAIN}
TOGETHER: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {},
        _layers(_SHARED | {"full_rank": ["q_proj", "q_proj"]}),
        "full_rank: named twice in ['q_proj', 'q_proj']",
    ),
    (
        {},
        _layers(
            _SHARED
            | {
                "lora": {"rank": 2, "alpha": 2.0, "modules": ["q_proj", "k_proj"]},
                "full_rank": ["o_proj", "k_proj"],
            }
        ),
        "full_rank: ['k_proj'] are in lora.modules too",
    ),
    (
        {},
        _layers(_SHARED | {"full_rank": ["up_proj"]})
        | {"target": VALID["target"] | {"intermediate_size": None}},
        "layers.0.full_rank: ['up_proj'] names MLP modules",
    ),
    (
        {},
        _layers(_OWN | {"boundary_of": "bound"}),
        "boundary_of: got 'bound', expected 'last' without boundary_hidden",
    ),
    *(
        (
            {},
            _layers(_OWN | {"per_position": True, bias: True}),
            "per_position: got true, expected false with biases",
        )
        for bias in ("qkv_bias", "o_bias")
    ),
    *(
        (
            {},
            _layers(_OWN, _MLP | {"form": form} | sizes),
            f"{key}: got {got}, expected {expected} where form is {form!r}",
        )
        for form, sizes, key, got, expected in (
            ("gated", {"rms_norm_eps": 1e-5}, "intermediate_size", "null", "a number"),
            ("gated", {"intermediate_size": 8}, "rms_norm_eps", "null", "a number"),
            ("plain", {}, "intermediate_size", "null", "a number"),
            (
                "plain",
                {"intermediate_size": 8, "rms_norm_eps": 0.5},
                "rms_norm_eps",
                0.5,
                "null",
            ),
            ("square", {"intermediate_size": 8}, "intermediate_size", 8, "null"),
            ("square", {"rms_norm_eps": 0.5}, "rms_norm_eps", 0.5, "null"),
        )
    ),
    (
        _layers(_OWN | {"boundary_hidden": True}),
        {"boundary_layers": [0, 4]},
        "boundary_layers: got 4, the target has layers 0 to 3",
    ),
    (
        _layers(_OWN | {"boundary_hidden": True}),
        {"boundary_layers": [-1]},
        "boundary_layers: got -1, the target has layers 0 to 3",
    ),
    (
        _layers(_OWN | {"boundary_hidden": True}),
        {"boundary_layers": [2, 2]},
        "boundary_layers: named twice in [2, 2]",
    ),
    ({}, {"boundary_layers": [2]}, "boundary_layers: got [2], but nothing reads"),
    # Heads are bound to no layer, which would have to be one of these.
    (
        HEADS,
        {"target": VALID["target"] | {"cached_layers": [1, 7]}},
        "cached_layers: got 7, the target has layers 0 to 3",
    ),
    # That layer reads the stream behind its own target layer, and no mix.
    (
        _layers(_OWN | {"boundary_hidden": True, "boundary_of": "bound"}),
        {"boundary_layers": [1]},
        "boundary_layers: got [1], but nothing reads their mix",
    ),
    *(
        ({}, {"extra_rows": 2} | other, "extra_rows: got 2, expected 0 with")
        for other in (
            _layers(_OWN | {"per_position": True}),
            _layers(_OWN, _MLP | {"per_position": True}),
            {"lm_head": "own"},
        )
    ),
    (
        HEADS,
        {"noise": {"low": 1, "high": 32, "token_ids": [3, 5]}},
        "noise: got an object, which does not go with input 'boundary'",
    ),
    (
        HEADS,
        {"chain": _CHAIN},
        "chain: got an object, which does not go with input 'boundary'",
    ),
    (
        HEADS | _layers(_OWN),
        {"extra_rows": 1},
        "extra_rows: got 1, which does not go with input 'boundary'",
    ),
    *(
        (
            HEADS,
            _layers(*layers),
            "input: got 'boundary', with which all positions would draft the same",
        )
        # Rows that are alike attend to rows that are alike.
        for layers in ([_MLP], [_MLP, _MLP], [_OWN | {"attention": "block"}])
    ),
    *(
        (CHAIN, {key: value}, f"{key}: got {got}, expected {expected} where chain is")
        for key, value, got, expected in (
            ("markov", {"rank": 2}, "an object", "null"),
            (
                "noise",
                {"low": 1, "high": 32, "token_ids": [3, 5]},
                "an object",
                "null",
            ),
            ("extra_rows", 2, "2", "0"),
            ("block_mask", "bidirectional", "'bidirectional'", "'causal'"),
            ("lm_head", "own", "'own'", "'target'"),
        )
    ),
    (
        CHAIN,
        _layers(_SHARED, _OWN | {"attention": "block"}),
        "layers.1.attention: got 'block', expected 'prefix' where chain",
    ),
    (
        CHAIN,
        _layers(_OWN, _MLP, _SHARED | {"target_layer": 1}),
        "layers.2.target_layer: got 1 again; where chain is not null",
    ),
]


@pytest.mark.parametrize(("sound", "added", "expected"), TOGETHER)
def test_what_does_not_go_together_is_refused_in_one_line(
    tmp_path: Path, sound: dict[str, Any], added: dict[str, Any], expected: str
) -> None:
    _read(tmp_path, _PLAIN | sound)
    message = _message(tmp_path, _PLAIN | sound | added)
    (problem,) = message.splitlines()[1:-1]
    assert expected in problem


@pytest.mark.parametrize(
    "told_apart",
    [
        {"num_speculative_tokens": 1},
        {"lm_head": "own"},
        {"markov": {"rank": 2}},
        _layers(_OWN),
        _layers(_MLP, _SHARED),
    ],
)
def test_heads_need_something_that_tells_positions_apart(
    tmp_path: Path, told_apart: dict[str, Any]
) -> None:
    config = _read(tmp_path, _PLAIN | HEADS | _layers(_MLP) | told_apart)
    assert config.num_placeholders == 0


def test_lora_modules_are_named_once(tmp_path: Path) -> None:
    path = ("layers", 0, "lora", "modules")
    message = _message(tmp_path, changed(path, ["q_proj", "q_proj"]))
    assert "modules: named twice in ['q_proj', 'q_proj']" in message


def test_lora_on_the_mlp_needs_a_dense_mlp(tmp_path: Path) -> None:
    config = changed(("target", "intermediate_size"), None)
    assert _read(tmp_path, config).target.intermediate_size is None
    config["layers"][0]["lora"]["modules"] = ["q_proj", "up_proj"]
    message = _message(tmp_path, config)
    assert "layers.0.lora.modules: ['q_proj', 'up_proj']" in message
    assert "target.intermediate_size is null" in message


def test_every_mistake_is_listed_at_once(tmp_path: Path) -> None:
    config = changed(("num_speculative_tokens",), "4")
    config["markov"]["rank"] = 0
    config["extra"] = 1
    message = _message(tmp_path, config)
    assert str(tmp_path / CONFIG_FILE) in message
    for part in ("num_speculative_tokens: got '4'", "markov.rank: got '0'", "extra:"):
        assert part in message


@pytest.mark.parametrize("text", ["[]", "null", "4", '"text"'])
def test_a_config_is_an_object(tmp_path: Path, text: str) -> None:
    assert "config: got" in _message(tmp_path, json.loads(text))
