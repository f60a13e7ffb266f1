# SPDX-License-Identifier: Apache-2.0
"""Whole runs on a tiny target."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import MakeArguments
from vllm_mtp.checkpoint import load_drafter
from vllm_mtp.training.run import train

LORA = {"lora_rank": 8, "lora_modules": ["q_proj", "down_proj"]}


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text("utf-8"))
    return [line["loss"] for line in state["log_history"] if "loss" in line]


class TestLearning:
    @pytest.mark.parametrize(
        "design",
        [
            {"layers": "shared:all", **LORA, "markov_rank": 16},
            {"layers": "own:0,3", "boundary_hidden": "first"},
            {"layers": "shared:0,own:3", "draft_vocab_size": 256, "markov_rank": 4},
        ],
        ids=["shared", "own", "mixed"],
    )
    def test_the_loss_falls_and_the_drafter_loads(
        self, arguments: MakeArguments, tiny_llama: Path, design: dict[str, Any]
    ) -> None:
        args = arguments(**design, max_steps=150, learning_rate=3e-3)
        metrics = train(args, tiny_llama)
        curve = losses(Path(str(args.output_dir)))
        assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
        drafter = load_drafter(str(args.output_dir))
        assert drafter.config.num_speculative_tokens == 3
        assert metrics["eval_acceptance_length"] >= 1.0
        if design["layers"] == "shared:all":
            assert metrics["eval_acceptance_place_1"] == 1.0


class TestResume:
    def test_a_stopped_run_goes_on_as_if_nothing_was(
        self, arguments: MakeArguments, tiny_llama: Path, tmp_path: Path
    ) -> None:
        design: dict[str, Any] = {
            "layers": "shared:0,own:3",
            "markov_rank": 4,
            **LORA,
            "save_strategy": "steps",
            "save_steps": 3,
            "max_steps": 8,
            "gradient_accumulation_steps": 2,
        }
        whole = arguments(**design, output_dir=str(tmp_path / "whole"))
        train(whole, tiny_llama)
        # Stopped after a checkpoint: what came behind it is lost.
        broken = arguments(**design, output_dir=str(tmp_path / "broken"))
        (tmp_path / "broken").mkdir()
        (tmp_path / "whole" / "checkpoint-6").rename(tmp_path / "broken/checkpoint-6")
        broken.resume_from_checkpoint = "last"
        train(broken, tiny_llama)
        assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
        ours = load_drafter(tmp_path / "broken").state_dict()
        for name, tensor in load_drafter(tmp_path / "whole").state_dict().items():
            assert torch.equal(ours[name], tensor), name
