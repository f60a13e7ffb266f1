# SPDX-License-Identifier: Apache-2.0
"""Settings that nothing in a drafter uses are refused, and named as they were given."""

from pathlib import Path
from typing import Any

import pytest

from vllm_mtp.cli.main import main
from vllm_mtp.drafter.options import DrafterOptions
from vllm_mtp.drafter.unused import require_used
from vllm_mtp.errors import MTPError

UNUSED: list[tuple[str, int, dict[str, Any], str]] = [
    (
        "own:0",
        2,
        {"mlp_form": "plain"},
        "mlp_form: got 'plain', but no layer is an MLP",
    ),
    ("shared:all", 2, {"mlp_size": 8}, "mlp_size: got 8, but no layer is an MLP"),
    ("shared:0", 2, {"own_attention": "block"}, "own_attention: .* no layer is an own"),
    ("shared:0", 2, {"own_init": "random"}, "own_init: got 'random', but no layer is"),
    ("shared:0", 2, {"bridges": True}, "bridges: got True, but no layer is an own"),
    (
        "shared:0",
        2,
        {"boundary_hidden": "all"},
        "boundary_hidden: .* no layer is an own",
    ),
    ("shared:0", 2, {"per_position": True}, "per_position: .* all layers are shared"),
    ("own:0", 2, {"lora_rank": 4}, "lora_rank: got 4, but no layer is a shared one"),
    (
        "own:0",
        2,
        {"full_rank_modules": ["q_proj"]},
        "full_rank_modules: .* no layer is",
    ),
    ("shared:0", 2, {"lora_alpha": 4.0}, "lora_alpha: got 4.0, but lora_rank is none"),
    ("shared:0", 2, {"lora_modules": ["q_proj"]}, "lora_modules: .* lora_rank is none"),
    (
        "own:0",
        2,
        {"prefix_window": 256, "own_attention": "block"},
        "prefix_window: got 256, but no layer reads the prefix",
    ),
    ("mlp:1", 1, {"prefix_window": 256}, "prefix_window: .* no layer reads the prefix"),
    ("mlp:1", 1, {"extra_rows": 2}, "extra_rows: got 2, but no layer attends"),
    ("mlp:1", 1, {"block_mask": "bidirectional"}, "block_mask: .* no layer attends"),
    ("shared:0", 1, {"lora_rank": 4}, "lora_rank: .* num_speculative_tokens is 1"),
    ("shared:0", 1, {"full_rank_modules": ["q_proj"]}, "full_rank_modules: .* is 1"),
    ("own:0", 1, {"markov_rank": 4}, "markov_rank: .* num_speculative_tokens is 1"),
    ("own:0", 1, {"placeholder_kind": "noise"}, "placeholder_kind: .* is 1"),
    ("own:0", 1, {"extra_rows": 2}, "extra_rows: .* num_speculative_tokens is 1"),
    ("own:0", 1, {"block_mask": "bidirectional"}, "block_mask: .* is 1"),
    (
        "mlp:2",
        2,
        {},
        "layers: got MLP layers alone, in which placeholders read nothing",
    ),
]
USED: list[tuple[str, int, dict[str, Any]]] = [
    ("own:0,mlp:1", 2, {"mlp_form": "plain", "mlp_size": 8, "bridges": True}),
    ("mlp:1", 2, {"per_position": True, "input": "boundary"}),
    ("own:0", 2, {"boundary_hidden": "all", "boundary_init": "identity"}),
    ("shared:0", 2, {"lora_rank": 0, "lora_alpha": 4.0, "lora_modules": ["q_proj"]}),
    ("shared:0", 1, {"input": "boundary", "lora_rank": 4, "prefix_window": 256}),
    ("own:0", 1, {"extra_rows": 2, "block_mask": "bidirectional"}),
    ("own:0", 1, {"prefix_window": 0, "markov_rank": 0, "mlp_size": 0}),
    # The token before, and nothing else, says what comes next.
    ("mlp:1", 1, {}),
    ("mlp:1", 2, {"markov_rank": 4}),
    ("mlp:1", 2, {"chain": True}),
    ("mlp:1,shared:0", 2, {}),
]


@pytest.mark.parametrize(("layers", "k", "values", "message"), UNUSED)
def test_what_nothing_uses_is_refused_in_a_line(
    layers: str, k: int, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(MTPError, match=f"^{message}") as error:
        require_used(DrafterOptions(**values), [layers], k)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("layers", "k", "values"), USED)
def test_what_something_uses_is_taken(
    layers: str, k: int, values: dict[str, Any]
) -> None:
    require_used(DrafterOptions(**values), [layers], k)


def test_a_stage_may_use_what_the_last_one_does_not() -> None:
    options = DrafterOptions(lora_rank=4)
    require_used(options, ["own:0,shared:1", "own:0"], 2)
    with pytest.raises(MTPError, match="lora_rank"):
        require_used(options, ["own:0"], 2)


@pytest.mark.parametrize(
    ("layers", "flags", "said"),
    [
        ("own:0", ["--mlp-form", "plain"], "--mlp-form: got 'plain', but no layer"),
        ("own:0", ["--mlp_form=plain"], "--mlp-form: got 'plain', but no layer"),
        ("shared:0", ["--lora-rank", "-1"], "--lora-rank: got -1, expected"),
        ("mlp:1", [], "--layers: got MLP layers alone"),
        ("own:0", ["--input", "boundary"], ""),
        (
            "own:0",
            ["--chain", "--own-attention", "block"],
            "--own-attention: got 'block', expected 'prefix'",
        ),
        (
            "own:0",
            ["--chain", "--placeholder-kind", "noise"],
            "--placeholder-kind: got an object",
        ),
        ("own:0", ["--draft-vocab-text", "a.txt"], "--draft-vocab-text: got 'a.txt'"),
    ],
)
def test_a_flag_is_named_as_it_is_written(
    layers: str,
    flags: list[str],
    said: str,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["init", "--target", str(tiny_llama), "--layers", layers, *flags]
    command += ["--num-speculative-tokens", "2", "--out", str(tmp_path / "d")]
    assert main(command) == (1 if said else 0)
    err = capsys.readouterr().err
    assert err.startswith(f"vllm-mtp init: {said}" if said else ""), err
    assert (tmp_path / "d").exists() == (not said)


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_key_of_a_file_is_named_as_it_stands_there(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("layers: own:0\nmlp_form: plain\ntarget: t\ndata: d\n")
    assert main([command, str(file)]) == 1
    said = f"vllm-mtp {command}: mlp_form: got 'plain', but no layer"
    assert capsys.readouterr().err.startswith(said)
    assert main([command, str(file), "--mlp-form", "square"]) == 1
    said = f"vllm-mtp {command}: --mlp-form: got 'square', but no layer"
    assert capsys.readouterr().err.startswith(said)
