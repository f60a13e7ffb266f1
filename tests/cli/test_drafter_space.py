# SPDX-License-Identifier: Apache-2.0
"""The lines of docs/drafter-space.md make the drafters that they are said to."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_targets import make_tiny_llama
from vllm_mtp.cli.main import main
from vllm_mtp.drafter.checkpoint import load_drafter
from vllm_mtp.drafter.config import DrafterConfig

DOC = Path(__file__).parents[2] / "docs" / "drafter-space.md"
LINES = [
    line
    for line in DOC.read_text("utf-8").splitlines()
    if line.startswith("vllm-mtp init")
]
# Keys of the config, or of its first layer, that make the point what it is.
POINTS: dict[str, dict[str, Any]] = {
    "pass": {"kind": "shared", "shares_whole_target": True},
    "apple": {"shares_whole_target": True},
    "uno": {"shares_whole_target": True},
    "orthrus": {"full_rank": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "bita": {"extra_rows": 16, "shares_whole_target": True},
    "parallel": {"kind": "own", "boundary_hidden": True},
    "medusa": {"form": "square", "lm_head": "own", "are_heads": True},
    "blockwise": {"form": "plain", "lm_head": "target", "are_heads": True},
    "meta": {"per_position": True, "input": "boundary", "read_layers": (29,)},
    "deepseek": {"kind": "own", "num_placeholders": 0},
    "glide": {"target_layer": 29, "num_placeholders": 0},
    "late": {"shared_layers": tuple(range(22, 30)), "boundary_sources": (21,)},
    "mixed": {"are_heads": True, "boundary_sources": (9, 19, 29)},
    "bidirectional": {"block_mask": "bidirectional", "read_layers": (9, 19, 29)},
    "alone": {"attention": "block", "read_layers": ()},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("target"), num_hidden_layers=30)


def _of(config: DrafterConfig, key: str) -> Any:
    first = config.layers[0]
    return getattr(config, key) if hasattr(config, key) else getattr(first, key)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[5])
def test_a_line_makes_its_point(line: str, target: Path, tmp_path: Path) -> None:
    words = shlex.split(line.replace("MODEL", str(target)))
    name = words[words.index("--out") + 1]
    words[words.index("--out") + 1] = str(tmp_path / name)
    assert main(words[1:]) == 0
    config = load_drafter(tmp_path / name).config
    assert {key: _of(config, key) for key in POINTS[name]} == POINTS[name]
    assert (config.chain is not None) == ("--chain" in words)
    assert (config.noise is not None) == (name == "uno")
    assert (config.markov is not None) == (name == "apple")


def test_every_point_has_a_line() -> None:
    assert [line.split()[5] for line in LINES] == list(POINTS)
    text = DOC.read_text("utf-8")
    for key in DrafterConfig.model_fields:
        plain = ("model_type", "format_version", "target", "dtype")
        sizes = ("num_speculative_tokens", "draft_vocab_size", "prefix_window")
        if key not in (*plain, *sizes, "layers"):
            assert f"| `{key}` |" in text, key


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            ["--mlp-form", "square", "--mlp-size", "8"],
            "--mlp-size: got 8, but mlp_form",
        ),
        (["--boundary-of", "bound"], "--boundary-of: got 'bound', but boundary_"),
        (["--chain", "--lm-head", "own"], "--lm-head: got 'own', expected 'target'"),
        (["--input", "boundary", "--own-attention", "block"], "would draft the same"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_in_a_line(
    flags: list[str],
    reason: str,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["init", "--target", str(tiny_llama), "--layers", "own:1"]
    command += ["--num-speculative-tokens", "3", "--out", str(tmp_path / "d"), *flags]
    assert main(command) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert reason in line
    assert not (tmp_path / "d").exists()
