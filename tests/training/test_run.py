# SPDX-License-Identifier: Apache-2.0
"""Whole runs on a tiny target."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml

from tests.data.conftest import make_tokenizer
from tests.full_disk import no_file_above
from tests.tiny_answers import MakeArguments, write_answers
from vllm_mtp.drafter.checkpoint import load_drafter, read_config, save_drafter
from vllm_mtp.errors import CheckpointError, DataError, MTPError, OutputError
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.training.resume import newest_whole
from vllm_mtp.training.run import train
from vllm_mtp.training.states import TrainingInputError

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
            {"layers": "own:0,3", "own_optimizer": "muon"},
            {"layers": "shared:0,own:3", "draft_vocab_size": 256, "markov_rank": 4},
        ],
        ids=["shared", "own", "muon", "mixed"],
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
        assert metrics["eval_teacher_forced_length"] >= 1.0
        files = {file.name for file in Path(str(args.output_dir)).iterdir()}
        assert files >= {
            "README.md",
            "config.json",
            "evaluation.json",
            "model.safetensors",
            "probe.safetensors",
            "provenance.json",
        }
        if design["layers"] == "shared:all":
            assert metrics["eval_teacher_forced_position_1"] == 1.0


class TestFullDisk:
    @pytest.mark.parametrize("room", [30_000, 300_000])
    def test_a_checkpoint_is_named_and_not_resumed(
        self, arguments: MakeArguments, tiny_llama: Path, room: int
    ) -> None:
        args = arguments(
            layers="shared:0,own:3", save_strategy="steps", save_steps=1, max_steps=1
        )
        with no_file_above(room), pytest.raises(OutputError) as caught:
            train(args, tiny_llama)
        assert f"{args.output_dir}/checkpoint-1: cannot be written" in str(caught.value)
        assert newest_whole(Path(str(args.output_dir))) is None

    def test_no_half_drafter_is_left(
        self, arguments: MakeArguments, tiny_llama: Path
    ) -> None:
        args = arguments(layers="own:0,3", save_strategy="no", max_steps=1)
        with no_file_above(30_000), pytest.raises(OutputError) as caught:
            train(args, tiny_llama)
        assert f"{args.output_dir}: cannot be written" in str(caught.value)
        with pytest.raises(CheckpointError):
            load_drafter(str(args.output_dir))


class TestResume:
    DESIGN: ClassVar[dict[str, Any]] = {
        "layers": "shared:0,own:3",
        "markov_rank": 4,
        **LORA,
        "own_optimizer": "muon",
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 8,
        "gradient_accumulation_steps": 2,
        # Both change while the run that is stopped goes on.
        "tv_weight": 0.5,
        "ce_start_steps": 60,
        "curriculum_steps": 200,
        # What is written is made of the steps before the stop too.
        "ema_decay": 0.99,
    }

    def test_a_stopped_run_goes_on_as_if_nothing_was(
        self, tiny_llama: Path, tiny_answers: Path, tmp_path: Path
    ) -> None:
        settings = tmp_path / "run.yaml"
        more = {
            "target": str(tiny_llama),
            "data": str(tiny_answers),
            "num_speculative_tokens": 3,
            "dtype": "float32",
            "use_cpu": True,
            "report_to": "none",
            "logging_steps": 1,
            # Long enough to be killed in the middle.
            "max_steps": 400,
            "save_steps": 40,
        }
        settings.write_text(yaml.safe_dump(self.DESIGN | more))
        command = [sys.executable, "-m", "vllm_mtp.cli.main", "train", str(settings)]
        broken, whole = tmp_path / "broken", tmp_path / "whole"
        resume = ["--resume_from_checkpoint", "last", "--output_dir", str(broken)]
        for number, step in ((signal.SIGINT, 40), (signal.SIGKILL, 160)):
            log = tmp_path / f"{number.name}.log"
            victim = subprocess.Popen(
                [*command, *resume],
                stderr=log.open("w", encoding="utf-8"),
                # A shell's background job ignores it.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            try:
                wait_for(broken / f"checkpoint-{step}" / "trainer_state.json")
                victim.send_signal(number)
                victim.wait(timeout=120)
            finally:
                victim.kill()
            text = log.read_text("utf-8")
            if number == signal.SIGINT:
                assert victim.returncode == 130, text
                assert "train: interrupted; with --resume-from-checkpoint" in text
                assert "Traceback" not in text
            assert not (broken / "config.json").exists(), "it was stopped in the middle"
        # A kill may also cut a checkpoint short.
        (broken / "checkpoint-399").mkdir()
        subprocess.run([*command, *resume], check=True)
        end = subprocess.run(
            [*command, "--output_dir", str(whole)],
            check=True,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Nothing else would show what the time behind the last step goes into.
        assert f"written to {whole}; evaluating" in end.stderr
        assert len(losses(whole)) == 400
        assert losses(broken) == losses(whole)
        ours = load_drafter(broken).state_dict()
        for name, tensor in load_drafter(whole).state_dict().items():
            assert torch.equal(ours[name], tensor), name
        papers = json.loads((broken / "provenance.json").read_text("utf-8"))
        assert papers["training"]["resumed_from_step"] >= 160

    def test_a_checkpoint_of_other_settings_is_refused(
        self, arguments: MakeArguments, tiny_llama: Path
    ) -> None:
        train(arguments(**self.DESIGN), tiny_llama)
        other = arguments(**self.DESIGN | {"markov_rank": 8})
        other.resume_from_checkpoint = "last"
        with pytest.raises(
            TrainingInputError, match="not of a drafter with these settings.*markov"
        ):
            train(other, tiny_llama)
        other.resume_from_checkpoint = str(Path(str(other.output_dir)) / "checkpoint-7")
        with pytest.raises(TrainingInputError, match="no whole checkpoint"):
            train(other, tiny_llama)


def wait_for(file: Path) -> None:
    for _ in range(6000):
        if file.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{file} did not come")


class TestStages:
    def test_each_stage_starts_from_the_one_before(
        self, arguments: MakeArguments, tiny_llama: Path
    ) -> None:
        args = arguments(
            layers="own:3", stages=["own:0,1,3", "own:1,3"], stage_steps=2, max_steps=2
        )
        train(args, tiny_llama)
        out = Path(str(args.output_dir))
        kept = [
            [layer.target_layer for layer in read_config(folder).layers]
            for folder in (out / "stage-1", out / "stage-2", out)
        ]
        assert kept == [[0, 1, 3], [1, 3], [3]]
        before = load_drafter(out / "stage-2").state_dict()["layers.1.q_proj.weight"]
        after = load_drafter(out).state_dict()["layers.0.q_proj.weight"]
        # Two small steps away from it, and nowhere near the target's own layer.
        assert 0 < (after - before).abs().max() < 0.02


def test_bfloat16_runs_through(arguments: MakeArguments, tiny_llama: Path) -> None:
    """Training, the evaluation in between, the probe and the last evaluation."""
    args = arguments(
        **LORA,
        layers="shared:0,own:3",
        boundary_hidden="first",
        markov_rank=4,
        kl_weight=1.0,
        feature_weight=0.1,
        dtype="bfloat16",
        bf16=True,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
    )
    metrics = train(args, tiny_llama)
    assert metrics["eval_teacher_forced_length"] >= 1.0
    assert load_drafter(str(args.output_dir)).config.dtype == "bfloat16"


class TestFaults:
    @pytest.mark.parametrize(
        ("design", "reason"),
        [
            ({"layers": "shared:all", "num_speculative_tokens": 1}, "nothing to train"),
            ({"layers": "shared:all", "train_places": 1}, "nothing to train"),
            # LoRA, placeholders and the correction act behind the first position.
            *(
                (
                    {"layers": layers, "train_places": 1, **weights},
                    "nothing to train at 1 taught position",
                )
                for layers in ("shared:all", "shared:0-2")
                for weights in (LORA, {"markov_rank": 4}, {"prefix_window": 8})
            ),
            ({"layers": "own:3", "max_text_tokens": 4}, "none of .* texts"),
        ],
    )
    def test_nothing_to_learn_is_refused(
        self,
        arguments: MakeArguments,
        tiny_llama: Path,
        design: dict[str, Any],
        reason: str,
    ) -> None:
        with pytest.raises(TrainingInputError, match=reason):
            train(arguments(**design), tiny_llama)

    def test_an_own_layer_is_trained_at_one_position(
        self, arguments: MakeArguments, tiny_llama: Path
    ) -> None:
        args = arguments(layers="shared:0,own:3", train_places=1, **LORA, max_steps=1)
        train(args, tiny_llama)
        trained = load_drafter(str(args.output_dir)).state_dict()
        start = new_drafter(tiny_llama, args.layers, 3, args).state_dict()
        moved = {name for name in start if not start[name].equal(trained[name])}
        assert moved == {name for name in start if name.startswith("layers.1.")}

    def test_new_positions_that_are_not_taught_are_refused(
        self, arguments: MakeArguments, tiny_llama: Path, tmp_path: Path
    ) -> None:
        options = DrafterOptions(dtype="float32")
        drafter = new_drafter(tiny_llama, "shared:0-2", 3, options)
        start = save_drafter(drafter, tmp_path / "start")
        extension: dict[str, Any] = {
            "layers": "shared:0-2",
            "num_speculative_tokens": 5,
            "train_only": "new_positions",
            "warm_start": str(start),
            "max_steps": 1,
        }
        with pytest.raises(
            TrainingInputError, match="train_places: got 3, .*write 4 or more"
        ):
            train(arguments(**extension, train_places=3), tiny_llama)
        args = arguments(**extension, train_places=4)
        train(args, tiny_llama)
        before = load_drafter(start).placeholders
        after = load_drafter(str(args.output_dir)).placeholders
        assert before is not None
        assert after is not None
        assert after[:2].equal(before)
        assert not after[2].equal(before[0])

    def test_a_stage_of_other_settings_is_refused(
        self, arguments: MakeArguments, tiny_llama: Path
    ) -> None:
        design = {"layers": "own:3", "stages": ["own:0,3"], "stage_steps": 1}
        train(arguments(**design, max_steps=1), tiny_llama)
        other = arguments(**design, max_steps=1, num_speculative_tokens=2)
        with pytest.raises(TrainingInputError, match="stage-1: holds a drafter of"):
            train(other, tiny_llama)

    def test_a_loss_that_is_not_finite_stops_the_run(
        self, arguments: MakeArguments, tiny_llama: Path
    ) -> None:
        args = arguments(layers="own:3", learning_rate=1e30, max_grad_norm=0.0)
        with pytest.raises(TrainingInputError, match="loss is not finite"):
            train(args, tiny_llama)

    def test_answers_of_another_target_are_refused(
        self, arguments: MakeArguments, tiny_qwen3: Path
    ) -> None:
        with pytest.raises(DataError, match="the answers are those of the target"):
            train(arguments(target=str(tiny_qwen3)), tiny_qwen3)


class TestOddIds:
    @pytest.mark.parametrize(
        ("every", "design"),
        [
            (True, {"layers": "own:0,3", "bridges": True, "boundary_hidden": "all"}),
            (False, {"layers": "shared:0,own:0,3", "feature_weight": 1.0}),
            (True, {"layers": "shared:all", **LORA, "kl_weight": 0.5}),
        ],
        ids=["bridges", "features", "shared"],
    )
    def test_answers_that_repeat_one_token_train(
        self,
        arguments: MakeArguments,
        tiny_llama: Path,
        tmp_path: Path,
        every: bool,
        design: dict[str, Any],
    ) -> None:
        texts = [
            [7] * 16 if every or number % 2 else list(range(number, number + 16))
            for number in range(12)
        ]
        data = write_answers(tmp_path / "data", tiny_llama, texts, [4] * 12)
        args = arguments(**design, data=str(data), max_steps=2)
        metrics = train(args, tiny_llama)
        assert metrics["eval_teacher_forced_length"] >= 1.0
        for name, weight in load_drafter(str(args.output_dir)).named_parameters():
            assert torch.isfinite(weight).all(), name

    def test_rows_of_the_embedding_that_are_no_token_are_not_drafted(
        self, arguments: MakeArguments, tiny_llama: Path, tmp_path: Path
    ) -> None:
        target, data = tmp_path / "target", tmp_path / "data"
        shutil.copytree(tiny_llama, target)
        tokenizer = make_tokenizer()  # of 260 tokens; the embedding has 512 rows
        tokenizer.save_pretrained(target)
        texts = [[i % 64 for i in range(n, n + 20)] for n in range(12)]
        write_answers(data, target, texts, [4] * 12)
        design = {"layers": "own:3", "target": str(target), "data": str(data)}
        size = len(tokenizer)
        args = arguments(**design, draft_vocab_size=size, max_steps=1)
        train(args, target)
        drafted = load_drafter(str(args.output_dir)).draft_vocab
        assert drafted is not None
        assert drafted.token_ids.tolist() == list(range(size))
        args = arguments(**design, draft_vocab_size=size + 1)
        with pytest.raises(MTPError, match="got 261, expected 1 to 260, the tokens"):
            train(args, target)
