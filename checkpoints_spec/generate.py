# SPDX-License-Identifier: Apache-2.0
"""Write what is generated in this folder.

The tables in ``README.md`` and ``config.schema.json`` come from the models in
``vllm_mtp/drafter/config.py``, so that the written format is the one that is read::

    python checkpoints_spec/generate.py            # write tables and schema
    python checkpoints_spec/generate.py --check    # exit 1 where they are stale
    python checkpoints_spec/generate.py --goldens  # make the golden drafters again
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.markdown import marked, table

HERE = Path(__file__).parent


class TensorRow(NamedTuple):
    """One row of the tensor table; ``dims`` are keys of `DIMENSIONS`."""

    name: str
    dims: tuple[str, ...]
    when: str
    meaning: str
    dtype: str = "`dtype`"


# Dimension -> where its size comes from. tests/drafter/test_golden.py holds the golden
# drafters against this table and the next.
DIMENSIONS = {
    "placeholders": "`num_speculative_tokens` - 1",
    "positions": "`num_speculative_tokens`",
    "positions?": "as positions, and only where the layer has `per_position`; without, "
    "the shape is what stands behind it",
    "extra": "`extra_rows`",
    "mixed": "length of `boundary_layers`",
    "hidden": "`target.hidden_size`",
    "two hidden": "2 × `target.hidden_size`: the token's half first",
    "queries": "`target.num_attention_heads` × `target.head_dim`, or of the layer's "
    "entry in `target.layer_heads`",
    "keys": "`target.num_key_value_heads` × `target.head_dim`, likewise",
    "query norm": "`target.head_dim`, or queries with `qk_norm_whole`",
    "key norm": "`target.head_dim`, or keys with `qk_norm_whole`",
    "one": "1",
    "mlp": "`intermediate_size` of the layer",
    "lora": "`lora.rank` of the layer",
    "in, out": "sizes of the module that is changed (table below)",
    "markov": "`markov.rank`",
    "vocab": "`target.vocab_size`",
    "drafted": "`draft_vocab_size`, or `target.vocab_size` where that is null",
}

_OWN = "own layer"
_BEFORE = "own layer with `norm_placement` before or around"
_AFTER = "own layer with `norm_placement` after or around"
_NORM = "own layer with `qk_norm`"
_BIAS = "own layer with `qkv_bias`"
_BRIDGE = "own layer with `bridge`"
_GATED, _PLAIN, _SQUARE = (
    f"MLP layer of `form` {form}" for form in ("gated", "plain", "square")
)
TENSORS = (
    TensorRow(
        "placeholders",
        ("placeholders", "hidden"),
        "`num_speculative_tokens` > 1, `input` block, `chain` null",
        "Input vectors of the positions behind the anchor, in order.",
    ),
    TensorRow(
        "extra_rows",
        ("extra", "hidden"),
        "`extra_rows` > 0",
        "Input vectors of the rows between anchor and placeholders, in order.",
    ),
    TensorRow(
        "boundary_mix",
        ("mixed",),
        "`boundary_layers` of two or more",
        "Weights of the streams in their mix, before a softmax; 0 in an untrained "
        "drafter.",
    ),
    TensorRow(
        "chain.token_norm.weight",
        ("hidden",),
        "`chain` not null",
        "RMSNorm of the token's embedding.",
    ),
    TensorRow(
        "chain.hidden_norm.weight",
        ("hidden",),
        "`chain` not null",
        "RMSNorm of the hidden state of the row before.",
    ),
    TensorRow(
        "chain.fuse.weight",
        ("hidden", "two hidden"),
        "`chain` not null",
        "What enters a row, from both. In an untrained drafter it is their sum.",
    ),
    TensorRow(
        "layers.{i}.lora.{module}.a",
        ("lora", "in"),
        "shared layer with `lora`, for each of `lora.modules`",
        "First factor of the change `alpha / rank * b @ a @ x`.",
    ),
    TensorRow(
        "layers.{i}.lora.{module}.b",
        ("out", "lora"),
        "with `.a`",
        "Second factor; 0 in an untrained drafter.",
    ),
    TensorRow(
        "layers.{i}.full_rank.{module}.weight",
        ("out", "in"),
        "shared layer, for each of `full_rank`",
        "Difference to the target's weight; 0 in an untrained drafter.",
    ),
    TensorRow(
        "layers.{i}.bridge.weight",
        ("positions?", "hidden", "hidden"),
        _BRIDGE,
        "Maps the stream to the layer's input; the identity in an untrained drafter.",
    ),
    TensorRow(
        "layers.{i}.bridge.bias",
        ("positions?", "hidden"),
        _BRIDGE,
        "Bias of the bridge.",
    ),
    TensorRow(
        "layers.{i}.boundary_proj.weight",
        ("positions?", "hidden", "hidden"),
        "own layer with `boundary_hidden`",
        "Projects the boundary hidden state; added to the layer's input.",
    ),
    TensorRow(
        "layers.{i}.input_norm.weight",
        ("hidden",),
        _BEFORE,
        "Norm in front of the attention.",
    ),
    TensorRow(
        "layers.{i}.q_proj.weight",
        ("positions?", "queries", "hidden"),
        _OWN,
        "Queries.",
    ),
    TensorRow(
        "layers.{i}.k_proj.weight", ("positions?", "keys", "hidden"), _OWN, "Keys."
    ),
    TensorRow(
        "layers.{i}.v_proj.weight", ("positions?", "keys", "hidden"), _OWN, "Values."
    ),
    TensorRow("layers.{i}.q_proj.bias", ("queries",), _BIAS, "Bias of the queries."),
    TensorRow("layers.{i}.k_proj.bias", ("keys",), _BIAS, "Bias of the keys."),
    TensorRow("layers.{i}.v_proj.bias", ("keys",), _BIAS, "Bias of the values."),
    TensorRow(
        "layers.{i}.q_norm.weight",
        ("query norm",),
        _NORM,
        "RMSNorm of each query head, or of all.",
    ),
    TensorRow(
        "layers.{i}.k_norm.weight",
        ("key norm",),
        _NORM,
        "RMSNorm of each key head, or of all.",
    ),
    TensorRow(
        "layers.{i}.output_gate_proj.weight",
        ("positions?", "queries", "hidden"),
        "own layer with `output_gate`",
        "Gate of the attention's output.",
    ),
    TensorRow(
        "layers.{i}.o_proj.weight",
        ("positions?", "hidden", "queries"),
        _OWN,
        "Attention output.",
    ),
    TensorRow("layers.{i}.o_bias", ("hidden",), "own layer with `o_bias`", "Its bias."),
    TensorRow(
        "layers.{i}.attention_out_norm.weight",
        ("hidden",),
        _AFTER,
        "Norm behind the attention.",
    ),
    TensorRow(
        "layers.{i}.mlp_norm.weight",
        ("hidden",),
        f"{_BEFORE}, not `parallel`",
        "Norm in front of the MLP.",
    ),
    TensorRow(
        "layers.{i}.norm.weight", ("hidden",), _GATED, "Norm in front of an MLP layer."
    ),
    TensorRow(
        "layers.{i}.gate_proj.weight",
        ("positions?", "mlp", "hidden"),
        f"{_OWN}, {_GATED}",
        "MLP's gate.",
    ),
    TensorRow(
        "layers.{i}.up_proj.weight",
        ("positions?", "mlp", "hidden"),
        f"{_OWN}, {_GATED}, {_PLAIN}",
        "MLP's up: the first linear map.",
    ),
    TensorRow("layers.{i}.up_proj.bias", ("positions?", "mlp"), _PLAIN, "Its bias."),
    TensorRow(
        "layers.{i}.down_proj.weight",
        ("positions?", "hidden", "mlp"),
        f"{_OWN}, {_GATED}, {_PLAIN}",
        "MLP's down: the last linear map; 0 in an untrained drafter that is no copy.",
    ),
    TensorRow("layers.{i}.down_bias", ("positions?", "hidden"), _PLAIN, "Its bias."),
    TensorRow(
        "layers.{i}.proj.weight",
        ("positions?", "hidden", "hidden"),
        _SQUARE,
        "The one linear map; 0 in an untrained drafter.",
    ),
    TensorRow("layers.{i}.proj.bias", ("positions?", "hidden"), _SQUARE, "Its bias."),
    TensorRow(
        "layers.{i}.mlp_out_norm.weight", ("hidden",), _AFTER, "Norm behind the MLP."
    ),
    TensorRow(
        "layers.{i}.output_scale",
        ("one",),
        "own layer with `output_scale`",
        "Factor of the stream behind the layer.",
    ),
    TensorRow(
        "lm_heads.weight",
        ("positions", "drafted", "hidden"),
        "`lm_head` own",
        "LM head of each position; the target's in an untrained drafter.",
    ),
    TensorRow(
        "draft_vocab.token_ids",
        ("drafted",),
        "`draft_vocab_size` not null",
        "Target token id of each output index; all different, in any order.",
        dtype="`int64`",
    ),
    TensorRow(
        "markov.embed.weight",
        ("vocab", "markov"),
        "`markov` not null",
        "E: a vector per previously drafted token.",
    ),
    TensorRow(
        "markov.gate.weight",
        ("markov", "hidden"),
        "`markov` not null",
        "G: gate from the position's last hidden state h.",
    ),
    TensorRow("markov.gate.bias", ("markov",), "`markov` not null", "g: its bias."),
    TensorRow(
        "markov.unembed.weight",
        ("drafted", "markov"),
        "`markov` not null",
        "U: bias on the logits, `U (sigmoid(G h + g) * E[previous])`.",
    ),
)

# Headings of the objects in config.json, in the order they are listed.
_OBJECTS = {
    "DrafterConfig": "The whole file",
    "SharedLayerConfig": '`layers[]` with `"kind": "shared"`',
    "LoRAConfig": "`layers[].lora`",
    "OwnLayerConfig": '`layers[]` with `"kind": "own"`',
    "MLPLayerConfig": '`layers[]` with `"kind": "mlp"`',
    "ChainConfig": "`chain`",
    "MarkovConfig": "`markov`",
    "NoiseConfig": "`noise`",
    "TargetFacts": "`target`",
    "LayerHeads": "`target.layer_heads[]`",
}


def config_schema() -> dict[str, Any]:
    """JSON schema of config.json, as strict as the reader."""
    schema = DrafterConfig.model_json_schema()
    layers = schema["properties"]["layers"]["items"]
    # The models give `kind` a default for use in Python, but a reader cannot
    # tell one kind from the other without the key: in a file it is required.
    for name in layers["oneOf"]:
        layer = schema["$defs"][_name_of(name)]
        del layer["properties"]["kind"]["default"]
        layer["required"].insert(0, "kind")
    named_once = (
        schema["$defs"]["LoRAConfig"]["properties"]["modules"],
        schema["$defs"]["SharedLayerConfig"]["properties"]["full_rank"],
        schema["properties"]["boundary_layers"],
    )
    for names in named_once:
        names["uniqueItems"] = True
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def config_tables(schema: dict[str, Any]) -> str:
    """One table per object in config.json."""
    objects = schema["$defs"] | {"DrafterConfig": schema}
    if unlisted := {n for n in objects if "properties" in objects[n]} - set(_OBJECTS):
        raise SystemExit(f"generate.py: name a heading in _OBJECTS for {unlisted}")
    return "\n\n".join(
        f"#### {heading}\n\n{objects[name]['description']}\n\n"
        + table(("Key", "Type", "Default", "Meaning"), _key_rows(objects[name]))
        for name, heading in _OBJECTS.items()
    )


def _key_rows(schema: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    for key, value in schema["properties"].items():
        default = "required"
        if key not in schema["required"]:
            default = f"`{json.dumps(value['default'])}`"
        yield f"`{key}`", _type(value), default, value["description"]


def _type(value: dict[str, Any]) -> str:
    """A JSON schema type in words."""
    if options := value.get("anyOf") or value.get("oneOf"):
        return " or ".join(_type(option) for option in options)
    if "$ref" in value:
        return f"object ({_OBJECTS[_name_of(value)]})"
    if choices := value.get("enum") or [value[key] for key in value if key == "const"]:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in choices)
    if value["type"] == "array":
        most = f"to {value['maxItems']}" if "maxItems" in value else "or more"
        return f"list, {value.get('minItems', 0)} {most}: {_type(value['items'])}"
    return value["type"] + _range(value)


def _range(value: dict[str, Any]) -> str:
    if "exclusiveMinimum" in value and "maximum" in value:
        return f" (above {value['exclusiveMinimum']}, up to {value['maximum']})"
    if "maximum" in value:
        return f" ({value['minimum']} to {value['maximum']})"
    if "minimum" in value:
        return f" ({value['minimum']} or more)"
    if "exclusiveMinimum" in value:
        return f" (above {value['exclusiveMinimum']})"
    return ""


def _name_of(reference: dict[str, str]) -> str:
    return reference["$ref"].rpartition("/")[2]


def tensor_tables() -> str:
    """The tensors and their dimensions."""
    rows = (
        (f"`{row.name}`", f"[{', '.join(row.dims)}]", row.dtype, row.when, row.meaning)
        for row in TENSORS
    )
    return "\n\n".join(
        (
            table(("Tensor", "Shape", "Type", "Present for", "Meaning"), rows),
            table(("Dimension", "Size"), DIMENSIONS.items()),
        )
    )


def with_block(text: str, name: str, content: str) -> str:
    """``text`` with the part between the markers of ``name`` replaced."""
    try:
        return marked(text, name, content)
    except ValueError:
        raise SystemExit(
            f"generate.py: README.md has no markers for {name!r}"
        ) from None


def generated_files(folder: Path = HERE) -> dict[Path, str]:
    """Every generated file and what it should hold."""
    schema = config_schema()
    readme = folder / "README.md"
    text = with_block(readme.read_text("utf-8"), "config", config_tables(schema))
    return {
        readme: with_block(text, "tensors", tensor_tables()),
        folder / "config.schema.json": json.dumps(schema, indent=2) + "\n",
    }


def stale_files(folder: Path = HERE) -> list[Path]:
    """Generated files that are not what they should be."""
    return [
        path
        for path, wanted in generated_files(folder).items()
        if not path.is_file() or path.read_text("utf-8") != wanted
    ]


def _check() -> int:
    stale = stale_files()
    for path in stale:
        print(f"stale: {path}; run python {__file__}", file=sys.stderr)
    return 1 if stale else 0


def _write() -> int:
    for path, text in generated_files().items():
        path.write_text(text, "utf-8")
    return 0


def _write_goldens() -> int:
    from goldens import write_goldens  # needs torch and transformers

    write_goldens(HERE / "golden")
    return 0


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    mode = parser.add_mutually_exclusive_group()
    for flag, action in (("--check", _check), ("--goldens", _write_goldens)):
        mode.add_argument(flag, dest="run", action="store_const", const=action)
    run: Callable[[], int] = parser.parse_args().run or _write
    return run()


if __name__ == "__main__":
    sys.exit(main())
