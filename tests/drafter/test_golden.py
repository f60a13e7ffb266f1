# SPDX-License-Identifier: Apache-2.0
"""The golden drafters and the written format: neither may drift from the code."""

import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file

from checkpoints_spec import generate
from checkpoints_spec.goldens import (
    GOLDENS,
    Blocks,
    draft_golden,
    golden_drafter,
    golden_target,
)
from tests.drafter.test_config import OBJECTS, VALID, KeyPath, changed, path_id
from vllm_mtp.drafter.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_drafter,
    save_drafter,
)
from vllm_mtp.drafter.config import (
    DrafterConfig,
    MLPLayerConfig,
    SharedLayerConfig,
)
from vllm_mtp.drafter.lora import linear_sizes
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.drafter.target_facts import TargetFacts

SPEC = Path(generate.__file__).parent
SCHEMA = json.loads((SPEC / "config.schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.fixture(params=GOLDENS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str) -> Path:
    return SPEC / "golden" / name


@pytest.fixture
def expected(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "expected.json").read_text("utf-8"))


def _listed_logits(blocks: Blocks, expected: dict[str, Any]) -> torch.Tensor:
    return blocks.scores[0][:, expected["logit_columns"]]


def _raw(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, list[int]]]:
    return {
        name: (tensor.dtype, tensor.flatten().view(torch.uint8).tolist())
        for name, tensor in tensors.items()
    }


def _header(file: Path) -> dict[str, Any]:
    """The safetensors header, read by hand."""
    data = file.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + size])


class TestFiles:
    def test_loading_and_saving_gives_the_same_files(
        self, folder: Path, tmp_path: Path
    ) -> None:
        again = save_drafter(load_drafter(folder), tmp_path)
        ours, theirs = again / CONFIG_FILE, folder / CONFIG_FILE
        assert ours.read_bytes() == theirs.read_bytes()
        ours, theirs = again / WEIGHTS_FILE, folder / WEIGHTS_FILE
        assert _header(ours) == _header(theirs)
        assert _raw(load_file(ours)) == _raw(load_file(theirs))

    def test_making_them_again_gives_the_same_drafter(
        self, name: str, folder: Path
    ) -> None:
        """So `expected.json` belongs to these weights, on every machine."""
        made, stored = golden_drafter(name, golden_target(name)), load_drafter(folder)
        assert made.config == stored.config
        assert _raw(made.state_dict()) == _raw(stored.state_dict())

    def test_target_is_the_one_in_the_config(
        self, name: str, folder: Path, tmp_path: Path
    ) -> None:
        golden_target(name).save_pretrained(tmp_path)
        facts = TargetFacts.from_folder(tmp_path)
        stored = load_drafter(folder).config.target
        assert stored.differences(facts) == []
        assert stored.weights_fingerprint == facts.weights_fingerprint

    def test_no_weight_is_zero(self, folder: Path) -> None:
        weights = dict(load_drafter(folder).named_parameters())
        assert all((weight != 0).all() for weight in weights.values())


class TestExpected:
    def test_drafts_are_as_written(
        self, name: str, folder: Path, expected: dict[str, Any]
    ) -> None:
        drafter = load_drafter(folder, dtype=torch.float32)
        blocks = draft_golden(name, drafter, expected["input"])
        assert blocks.tokens[0].tolist() == expected["draft_token_ids"]
        torch.testing.assert_close(
            _listed_logits(blocks, expected),
            torch.tensor(expected["logits"]),
            atol=1e-4,
            rtol=1e-4,
        )

    def test_every_tensor_matters(
        self, name: str, folder: Path, expected: dict[str, Any]
    ) -> None:
        """A tensor that is ignored, or put in the wrong place, shows."""
        logits = torch.tensor(expected["logits"])
        for tensor_name in load_drafter(folder).state_dict():
            drafter = load_drafter(folder, dtype=torch.float32)
            tensor = drafter.state_dict()[tensor_name]
            tensor.copy_(tensor.roll(1, 0) if len(tensor) > 1 else tensor * 2)
            blocks = draft_golden(name, drafter, expected["input"])
            tokens_changed = blocks.tokens[0].tolist() != expected["draft_token_ids"]
            change = (_listed_logits(blocks, expected) - logits).abs().max()
            assert tokens_changed or change > 1e-3, tensor_name


# Settings without a tensor: what one of them says must show in the drafts.
AXES: list[tuple[str, KeyPath, Any]] = [
    ("bidirectional", ("block_mask",), "causal"),
    ("bidirectional", ("layers", 2, "attention"), "prefix"),
    ("block-attention", ("layers", 0, "attention"), "prefix"),
    ("mixed-streams", ("boundary_layers",), [0, 2]),
    ("mixed-streams", ("layers", 1, "boundary_of"), "last"),
]


@pytest.mark.parametrize(("name", "path", "value"), AXES)
def test_a_setting_without_tensors_matters(
    name: str, path: KeyPath, value: Any
) -> None:
    folder = SPEC / "golden" / name
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    config = at = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    for key in path[:-1]:
        at = at[key]
    assert at[path[-1]] != value
    at[path[-1]] = value
    other = Drafter(DrafterConfig.model_validate_json(json.dumps(config)))
    other.load_state_dict(load_drafter(folder, dtype=torch.float32).state_dict())
    found = _listed_logits(draft_golden(name, other, expected["input"]), expected)
    assert (found - torch.tensor(expected["logits"])).abs().max() > 1e-2


class TestSchema:
    def test_is_a_schema(self) -> None:
        VALIDATOR.check_schema(SCHEMA)

    def test_takes_golden_configs(self, folder: Path) -> None:
        VALIDATOR.validate(json.loads((folder / CONFIG_FILE).read_text("utf-8")))

    def test_takes_what_the_reader_takes(self) -> None:
        VALIDATOR.validate(VALID)

    @pytest.mark.parametrize("path", OBJECTS, ids=path_id)
    def test_refuses_unknown_keys(self, path: KeyPath) -> None:
        assert not VALIDATOR.is_valid(changed((*path, "surprise"), 7))

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("format_version",), 2),
            (("num_speculative_tokens",), "4"),
            (("num_speculative_tokens",), 65),
            (("layers",), []),
            (("layers", 0, "kind"), "borrowed"),
            (("layers", 0, "lora", "modules"), ["q_proj", "q_proj"]),
            (("layers", 1, "rms_norm_eps"), 0.0),
            (("dtype",), "float64"),
            (("target", "head_dim"), 0),
        ],
        ids=path_id,
    )
    def test_refuses_wrong_values(self, path: KeyPath, value: Any) -> None:
        assert not VALIDATOR.is_valid(changed(path, value))

    @pytest.mark.parametrize(
        "path", [("dtype",), ("layers", 0, "kind"), ("target", "vocab_size")]
    )
    def test_refuses_missing_keys(self, path: KeyPath) -> None:
        assert not VALIDATOR.is_valid(changed(path, remove=True))


def _sizes(config: DrafterConfig, index: int, module: str) -> dict[str, int]:
    """`generate.DIMENSIONS` as numbers, for the layer with this index."""
    layer = config.layers[index]
    target = config.target
    if not isinstance(layer, MLPLayerConfig):
        target = target.of_layer(layer.target_layer)
    whole = getattr(layer, "qk_norm_whole", False)
    sizes = {
        "placeholders": config.num_speculative_tokens - 1,
        "positions": config.num_speculative_tokens,
        "extra": config.extra_rows,
        "mixed": len(config.boundary_layers),
        "hidden": target.hidden_size,
        "two hidden": 2 * target.hidden_size,
        "queries": target.num_attention_heads * target.head_dim,
        "keys": target.num_key_value_heads * target.head_dim,
        "query norm": target.head_dim * (target.num_attention_heads if whole else 1),
        "key norm": target.head_dim * (target.num_key_value_heads if whole else 1),
        "one": 1,
        "vocab": target.vocab_size,
        "drafted": config.draft_vocab_size or target.vocab_size,
    }
    if config.markov:
        sizes["markov"] = config.markov.rank
    if not isinstance(layer, SharedLayerConfig):
        sizes["mlp"] = layer.intermediate_size or 0
        if layer.per_position:
            sizes["positions?"] = config.num_speculative_tokens
    elif module:
        sizes["lora"] = layer.lora.rank if layer.lora else 0
        sizes["in"], sizes["out"] = linear_sizes(target, module)  # type: ignore[arg-type]
    return sizes


def _rows_of(tensor_name: str) -> list[tuple[generate.TensorRow, re.Match[str]]]:
    """Rows of the tensor table that describe a tensor."""
    found = []
    for row in generate.TENSORS:
        pattern = re.escape(row.name)
        pattern = pattern.replace(r"\{i\}", r"(?P<i>\d+)")
        pattern = pattern.replace(r"\{module\}", r"(?P<module>\w+)")
        if match := re.fullmatch(pattern, tensor_name):
            found.append((row, match))
    return found


class TestTables:
    def test_every_tensor_is_described(self, folder: Path) -> None:
        drafter = load_drafter(folder)
        for name, tensor in drafter.state_dict().items():
            ((row, match),) = _rows_of(name)  # one row and no more
            groups = match.groupdict()
            sizes = _sizes(
                drafter.config, int(groups.get("i", 0)), groups.get("module", "")
            )
            dims = [dim for dim in row.dims if dim in sizes or not dim.endswith("?")]
            assert list(tensor.shape) == [sizes[dim] for dim in dims], name
            is_ids = tensor.dtype == torch.int64
            assert row.dtype == ("`int64`" if is_ids else "`dtype`"), name

    def test_every_row_is_of_some_golden_tensor(self) -> None:
        used = {
            row.name
            for name in GOLDENS
            for tensor in load_file(SPEC / "golden" / name / WEIGHTS_FILE)
            for row, _ in _rows_of(tensor)
        }
        assert used == {row.name for row in generate.TENSORS}

    def test_every_dimension_is_explained(self) -> None:
        explained = {dim for dims in generate.DIMENSIONS for dim in dims.split(", ")}
        assert explained == {dim for row in generate.TENSORS for dim in row.dims}

    @pytest.mark.parametrize("path", OBJECTS, ids=path_id)
    def test_every_key_is_listed(self, path: KeyPath) -> None:
        readme = (SPEC / "README.md").read_text("utf-8")
        at: Any = VALID
        for key in path:
            at = at[key]
        assert all(f"| `{key}` |" in readme for key in at)


class TestGenerate:
    def test_nothing_is_stale(self) -> None:
        # As CI runs it, and from elsewhere.
        command = [sys.executable, str(SPEC / "generate.py"), "--check"]
        result = subprocess.run(command, cwd="/", capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")

    @pytest.mark.parametrize(
        ("file", "old", "new"),
        [
            # A key had another name, a description another text, a row is new.
            ("README.md", "`markov`", "`correction`"),
            ("README.md", "Rank of the bias.", ""),
            ("README.md", "| `placeholders` |", "| `vectors` |"),
            ("config.schema.json", '"markov"', '"correction"'),
        ],
    )
    def test_stale_files_are_found(
        self, tmp_path: Path, file: str, old: str, new: str
    ) -> None:
        for source in ("README.md", "config.schema.json"):
            shutil.copy(SPEC / source, tmp_path)
        assert generate.stale_files(tmp_path) == []
        text = (tmp_path / file).read_text("utf-8")
        (tmp_path / file).write_text(text.replace(old, new), "utf-8")
        assert generate.stale_files(tmp_path) == [tmp_path / file]

    def test_missing_files_are_stale(self, tmp_path: Path) -> None:
        shutil.copy(SPEC / "README.md", tmp_path)
        stale = generate.stale_files(tmp_path)
        assert stale == [tmp_path / "config.schema.json"]

    def test_markers_are_needed(self) -> None:
        with pytest.raises(SystemExit, match="no markers for 'config'"):
            generate.with_block("text without markers", "config", "tables")
