# SPDX-License-Identifier: Apache-2.0
"""Whole runs of drafters in other shapes than a block of placeholders."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_answers import MakeArguments
from vllm_mtp.drafter.checkpoint import load_drafter
from vllm_mtp.evaluation.probe import read_probe
from vllm_mtp.training.run import train

DESIGNS: dict[str, dict[str, Any]] = {
    "heads": {
        **{"layers": "mlp:1", "mlp_form": "square", "input": "boundary"},
        **{"per_position": True, "lm_head": "own", "loss_vocab_size": 64},
    },
    "chain": {
        **{"layers": "shared:0,own:3", "chain": True, "kl_weight": 0.5},
        "train_places": 2,
    },
    "streams": {
        **{"layers": "own:1,own:3,mlp:1", "own_attention": "block"},
        **{"boundary_hidden": "first", "boundary_layers": [3, 1]},
        **{"block_mask": "bidirectional", "per_position": True, "bridges": True},
    },
    "extra rows": {
        **{"layers": "shared:all", "extra_rows": 2, "own_optimizer": "as_optim"},
        "full_rank_modules": ["q_proj", "down_proj"],
    },
}


@pytest.mark.parametrize("name", DESIGNS)
def test_the_loss_falls_and_the_folder_is_whole(
    name: str, arguments: MakeArguments, tiny_llama: Path
) -> None:
    args = arguments(**DESIGNS[name], max_steps=25, learning_rate=3e-3)
    metrics = train(args, tiny_llama)
    folder = Path(str(args.output_dir))
    state = json.loads((folder / "trainer_state.json").read_text("utf-8"))
    curve = [line["loss"] for line in state["log_history"] if "loss" in line]
    assert sum(curve[-5:]) < 0.97 * sum(curve[:5])
    assert metrics["eval_teacher_forced_length"] >= 1.0
    drafter, probe = load_drafter(folder), read_probe(folder)
    assert probe is not None
    assert probe.run.outcome.drafts.shape[1] == drafter.config.num_speculative_tokens
    assert (folder / "README.md").is_file()


def test_heads_that_grow_keep_what_they_drafted(
    arguments: MakeArguments, tiny_llama: Path, tmp_path: Path
) -> None:
    design = DESIGNS["heads"]
    args = arguments(**design, max_steps=3, output_dir=str(tmp_path / "short"))
    train(args, tiny_llama)
    longer = arguments(
        **design,
        **{"num_speculative_tokens": 5, "warm_start": str(tmp_path / "short")},
        **{"train_only": "new_positions", "max_steps": 3, "weight_decay": 0.5},
        output_dir=str(tmp_path / "long"),
    )
    train(longer, tiny_llama)
    old, new = (load_drafter(tmp_path / name) for name in ("short", "long"))
    for name, first in new.weights_by_position().items():
        rows = new.get_parameter(name)
        assert rows[: 3 - first].equal(old.get_parameter(name)), name
        assert not rows[3 - first :].equal(rows[1 - first : 3 - first]), name


@pytest.mark.parametrize(
    "design",
    [DESIGNS["heads"], {"layers": "shared:0", "chain": True}],
    ids=["heads", "chain"],
)
def test_one_position_is_trained(
    design: dict[str, Any], arguments: MakeArguments, tiny_llama: Path
) -> None:
    args = arguments(**design, num_speculative_tokens=1, max_steps=2)
    train(args, tiny_llama)
    assert load_drafter(str(args.output_dir)).config.num_speculative_tokens == 1
