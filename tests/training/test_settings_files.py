# SPDX-License-Identifier: Apache-2.0
"""The shipped settings files are those that made the shipped drafters."""

from pathlib import Path

import pytest

from vllm_mtp.cli.main import _load
from vllm_mtp.drafter.checkpoint import read_config
from vllm_mtp.installed import installed_folder
from vllm_mtp.sharing.provenance import read_provenance
from vllm_mtp.training.record import told_arguments

EXAMPLES = Path(__file__).parents[2] / "examples" / "train"
DRAFTERS = {name: installed_folder(name) for name in ("cheap", "shared")}
NEEDED = ["--target", "t", "--data", "d"]
# Names of 0.1, and what they are called now.
RENAMED = {"place_decay": "position_decay"}
# The file's first lines name the seed; `eval_steps` only says when to look; the window
# came after training, and no text was as long.
BESIDE = {"seed", "eval_steps", "prefix_window"}


@pytest.mark.parametrize("name", DRAFTERS)
def test_the_file_is_what_the_provenance_tells(name: str) -> None:
    provenance = read_provenance(DRAFTERS[name])
    assert provenance is not None
    assert provenance.training is not None
    made_with = {
        RENAMED.get(key, key): value
        for key, value in provenance.training.arguments.items()
    }
    told = told_arguments(_load("train", [str(EXAMPLES / f"{name}.yaml"), *NEEDED]))
    for key in BESIDE:
        made_with.pop(key, None)
        told.pop(key, None)
    assert told == made_with


@pytest.mark.parametrize("name", DRAFTERS)
def test_the_file_says_that_other_runs_came_before(name: str) -> None:
    provenance = read_provenance(DRAFTERS[name])
    assert provenance is not None
    assert provenance.training is not None
    assert provenance.parent is not None, "else the file could make it alone"
    first_lines = (EXAMPLES / f"{name}.yaml").read_text("utf-8").partition("\n\n")[0]
    assert "runs that made the reference drafter" in first_lines
    assert "Without" in first_lines
    seed = provenance.training.arguments["seed"]
    assert f"--warm-start {'FOURTH' if name == 'cheap' else 'FIRST'} --seed {seed}" in (
        first_lines
    )


@pytest.mark.parametrize("name", DRAFTERS)
def test_the_drafter_has_the_files_layers_and_sizes(name: str) -> None:
    args = _load("train", [str(EXAMPLES / f"{name}.yaml"), *NEEDED])
    config = read_config(DRAFTERS[name])
    assert config.draft_vocab_size == args.draft_vocab_size
    assert config.prefix_window == args.prefix_window
    assert config.markov is not None
    assert config.markov.rank == args.markov_rank
    assert config.num_speculative_tokens == args.num_speculative_tokens
    window, longest = config.prefix_window, args.max_text_tokens
    assert window is None or window >= longest, "training would have met the window"
