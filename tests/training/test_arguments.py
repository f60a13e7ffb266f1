# SPDX-License-Identifier: Apache-2.0
"""Settings from flags and YAML."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from tests.tiny_answers import MakeArguments
from vllm_mtp.cli.main import _load, main
from vllm_mtp.cli.train import Train
from vllm_mtp.errors import MTPError
from vllm_mtp.training.arguments import DrafterTrainingArguments

EXAMPLES = sorted(
    file
    for file in (Path(__file__).parents[2] / "examples").rglob("*.yaml")
    if file.name != "rows.yaml"
)
NEEDED = ["--target", "t", "--data", "d", "--use_cpu", "true"]


def load(*flags: str):  # type: ignore[no-untyped-def]
    return _load("train", [*flags, *NEEDED])


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_settings_are_valid(file: Path) -> None:
    args = load(str(file))
    assert args.plan().objective.position_weights(4).sum() == pytest.approx(1.0)


def test_there_are_examples() -> None:
    assert {file.stem for file in EXAMPLES} >= {"shared", "cheap", "base", "demo"}


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "layers: shared:0\nlearning_rate: 0.5\nlora_rank: 2\n"
        "lora_modules: [q_proj, k_proj]"
    )
    args = load(str(file), "--learning_rate", "0.25")
    assert (args.layers, args.learning_rate) == ("shared:0", 0.25)
    assert args.lora_modules == ["q_proj", "k_proj"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'.*did you mean 'learning_rate'"),
        ("- 1", "expected `key: value` lines"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(MTPError, match=f"run.yaml: .*{reason}"):
        load(str(file))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MTPError, match="no such file"):
        load(str(tmp_path / "none.yaml"))


def test_target_and_data_are_needed() -> None:
    with pytest.raises(MTPError, match="both are needed"):
        _load("train", ["--target", "t"])


def test_new_positions_need_a_start() -> None:
    with pytest.raises(MTPError, match="needs warm_start"):
        load("--train_only", "new_positions")


def load_yaml(folder: Path, text: str, *flags: str):  # type: ignore[no-untyped-def]
    file = folder / "run.yaml"
    file.write_text(text)
    return load(str(file), *flags)


class TestNothing:
    """argparse cannot say it, so YAML must not seem to."""

    @pytest.mark.parametrize("value", ["[]", "null", "none", "[none]"])
    def test_no_report_is_none(self, tmp_path: Path, value: str) -> None:
        assert load_yaml(tmp_path, f"report_to: {value}").report_to == []

    @pytest.mark.parametrize(
        "line", ["lora_rank: null", "train_texts:", "stages: []", "stages: null"]
    )
    def test_where_it_is_the_default(self, tmp_path: Path, line: str) -> None:
        assert not getattr(load_yaml(tmp_path, line), line.partition(":")[0])

    @pytest.mark.parametrize(
        ("line", "default"),
        [
            ("save_total_limit: null", "2"),
            ("lora_modules: []", "'q_proj', 'v_proj', 'o_proj'"),
        ],
    )
    def test_elsewhere_it_is_refused(
        self, tmp_path: Path, line: str, default: str
    ) -> None:
        with pytest.raises(
            MTPError, match=f"run.yaml: {line.partition(':')[0]}: got"
        ) as e:
            load_yaml(tmp_path, line)
        assert default in str(e.value)
        assert "a large number for a limit" in str(e.value)


def test_a_mapping_is_handed_on(tmp_path: Path) -> None:
    text = "lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 2}"
    assert load_yaml(tmp_path, text).lr_scheduler_kwargs == {"num_cycles": 2}


def test_a_rate_that_falls_in_the_end(tmp_path: Path) -> None:
    text = (
        "lr_scheduler_type: warmup_stable_decay\n"
        "lr_scheduler_kwargs: {num_decay_steps: 100}"
    )
    by_file = load_yaml(tmp_path, text)
    by_flags = load(
        *("--lr_scheduler_type", "warmup_stable_decay"),
        *("--lr_scheduler_kwargs", '{"num_decay_steps": 100}'),
    )
    for args in (by_file, by_flags):
        assert args.lr_scheduler_type == "warmup_stable_decay"
        assert args.lr_scheduler_kwargs == {"num_decay_steps": 100}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{}", "write lr_scheduler_kwargs: {num_decay_steps: 100}"),
        ("{num_decay_steps: 0.2}", "got num_decay_steps 0.2, expected a whole"),
        ("{num_decay_steps: -1}", "got num_decay_steps -1, expected a whole"),
        ("{num_decay_steps: 2, num_stable_steps: 9}", "got num_stable_steps"),
    ],
)
def test_a_rate_that_would_not_fall_in_the_end(
    tmp_path: Path, given: str, said: str
) -> None:
    text = f"lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {given}"
    with pytest.raises(MTPError, match=re.escape(said)):
        load_yaml(tmp_path, text)


def test_a_bare_no_is_no_strategy(tmp_path: Path) -> None:
    args = load_yaml(tmp_path, "save_strategy: no\nbf16: no")
    assert (args.save_strategy, args.bf16) == ("no", False)


def test_keys_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(MTPError, match="unknown key 1"):
        load_yaml(tmp_path, "1: 2\nwings: 2\nno: 3")


class TestTheBest:
    @pytest.mark.parametrize(
        "flags",
        [
            ["--load_best_model_at_end", "true", "--save_strategy", "steps"],
            ["--save_strategy", "best"],
        ],
    )
    def test_is_the_longest_acceptance(self, flags: list[str]) -> None:
        args = load(*flags, "--eval_strategy", "steps", "--eval_steps", "500")
        assert args.metric_for_best_model == "eval_teacher_forced_length"
        assert args.greater_is_better is True

    def test_is_not_asked_for_by_itself(self) -> None:
        assert load().metric_for_best_model is None

    def test_another_metric_is_kept(self, arguments: MakeArguments) -> None:
        name = "eval_teacher_forced_position_1"
        args = arguments(
            save_strategy="best", eval_strategy="epoch", metric_for_best_model=name
        )
        assert args.metric_for_best_model == name
        # Stages are made of the whole run's arguments.
        assert replace(args, layers="own:0").metric_for_best_model == name

    @pytest.mark.parametrize("name", ["loss", "eval_loss"])
    def test_no_loss_is_measured(self, name: str) -> None:
        reason = (
            f"got '{name}'.*eval_teacher_forced_length, eval_teacher_forced_position_1"
        )
        with pytest.raises(MTPError, match=reason):
            load("--metric_for_best_model", name)

    @pytest.mark.parametrize(
        ("former", "now"),
        [
            ("eval_acceptance_length", "eval_teacher_forced_length"),
            ("acceptance_length", "eval_teacher_forced_length"),
            ("eval_acceptance_place_2", "eval_teacher_forced_position_2"),
            ("eval_acceptance_position_1", "eval_teacher_forced_position_1"),
        ],
    )
    def test_former_names_are_told_what_they_are_now(
        self, former: str, now: str
    ) -> None:
        with pytest.raises(MTPError, match=f"got '{former}', which is named {now} now"):
            load("--metric_for_best_model", former)

    def test_needs_evaluations(self) -> None:
        with pytest.raises(MTPError, match="eval_strategy is 'no'"):
            load("--save_strategy", "best")

    def test_a_refusal_by_transformers_is_one_of_ours(self) -> None:
        with pytest.raises(MTPError, match="refused by transformers: .*load_best"):
            load("--load_best_model_at_end", "true")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"anchors_per_text": 0}, "anchors_per_text: got 0, expected 1 or more"),
        ({"target_device_map": "auto"}, "got 'auto', but training is on the CPU"),
        ({"eval_anchors": 0}, "eval_anchors: got 0"),
        ({"eval_texts": -1}, "eval_texts: got -1"),
        ({"teacher_tokens": -1}, "teacher_tokens: got -1"),
        ({"block_attention": "flex"}, "block_attention: got 'flex' on cpu"),
        (
            {"block_attention": "flex", "block_mask": "bidirectional"},
            "block_attention: got 'flex'.*but block_mask is 'bidirectional'; write sl",
        ),
        (
            {"block_attention": "flex", "chain": True, "layers": "own:0"},
            "block_attention: got 'flex'.*but chain is True; write slices",
        ),
        (
            {"feature_weight": 0.5, "chain": True, "layers": "own:0"},
            "feature_weight: got 0.5, but chain is True",
        ),
        (
            {"feature_weight": 0.5, "extra_rows": 2, "layers": "own:0"},
            "feature_weight: got 0.5, but extra_rows is 2",
        ),
        ({"max_text_tokens": 0}, "max_text_tokens: got 0"),
        ({"train_texts": 0}, "train_texts: got 0, .*leave it out for all"),
        ({"loss_vocab_size": 0}, "loss_vocab_size: got 0"),
        ({"draft_vocab_size": -4}, "draft_vocab_size: got -4"),
        ({"feature_weight": -0.5}, "feature_weight: got -0.5, expected 0"),
        ({"states_budget_gb": float("nan")}, "states_budget_gb: got nan"),
        (
            {"unvisited_weight": 1.5},
            "unvisited_weight: got 1.5, expected a weight from",
        ),
        ({"unvisited_weight": float("nan")}, "unvisited_weight: got nan"),
        ({"placeholder_lr_scale": 0.0}, "placeholder_lr_scale: got 0.0, .*above 0"),
        ({"markov_lr_scale": -1.0}, "markov_lr_scale: got -1.0"),
        ({"stages": ["own:0"]}, "stage_steps: got 0"),
        (
            {
                "stages": ["own:0"],
                "stage_steps": 1,
                "train_only": "new_positions",
                "warm_start": "d",
            },
            "does not go with stages",
        ),
        (
            {
                "train_only": "new_positions",
                "warm_start": "d",
                "curriculum_steps": 2,
            },
            "new_positions does not go with curriculum_steps .got 2.",
        ),
        ({"feature_weight": 1.0}, "needs an own layer, .*'shared:all'"),
        (
            {
                "feature_weight": 1.0,
                "layers": "own:0",
                "stages": ["shared:0"],
                "stage_steps": 1,
            },
            "needs an own layer, .*'shared:0'",
        ),
        ({"train_places": 4}, "train_places: got 4, but the drafter has 3"),
        ({"train_places": 0}, "train_places: got 0, expected 1 or more"),
        ({"own_optimizer": "muon"}, "no own layer to train; leave it out"),
        (
            {"own_optimizer": "muon", "layers": "own:3", "per_position": True},
            "own_optimizer: got 'muon', which is for matrices",
        ),
        (
            {
                "own_optimizer": "muon",
                "layers": "own:3",
                "optim": "schedule_free_adamw",
            },
            "muon' and optim schedule_free_adamw, which do not go together",
        ),
        (
            {"kl_weight": 1.0, "draft_vocab_size": 8},
            "teacher_tokens: got 64, but draft_vocab_size .*write 8 or less",
        ),
        (
            {"tv_weight": 1.0, "loss_vocab_size": 63},
            "teacher_tokens: got 64, but loss_vocab_size",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_settings_are_refused(
    arguments: MakeArguments, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(MTPError, match=reason):
        arguments(**settings)


def test_processes_do_not_divide_their_targets_over_the_same_gpus(
    arguments: MakeArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        DrafterTrainingArguments, "world_size", property(lambda _: 8), raising=False
    )
    with pytest.raises(MTPError, match="got 'balanced' with 8 processes.*start one"):
        arguments(target_device_map="balanced")


def test_edges_are_accepted(arguments: MakeArguments) -> None:
    arguments(
        anchors_per_text=1,
        train_texts=1,
        states_budget_gb=0.0,
        loss_vocab_size=8,  # fewer than teacher_tokens, but there is no teacher
        layers="shared:0,own:3",
        feature_weight=0.5,
    )


class TestMachine:
    def test_several_gpus_are_not_for_data_parallel(
        self,
        arguments: MakeArguments,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        real = TrainingArguments.__post_init__

        def with_two_gpus(self: TrainingArguments) -> None:
            real(self)
            self._n_gpu = 2

        monkeypatch.setattr(TrainingArguments, "__post_init__", with_two_gpus)
        handler = caplog.handler
        logger = logging.getLogger("vllm.mtp_placeholder.training")
        logger.addHandler(handler)  # vLLM's own loggers may not propagate
        logger.setLevel(logging.WARNING)  # nor say anything
        try:
            args = arguments(per_device_train_batch_size=2)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)
        assert args.n_gpu == 1
        assert args.train_batch_size == 2
        assert "one of 2 GPUs" in caplog.text
        assert "accelerate launch -m vllm_mtp.cli.main train" in caplog.text

    def test_no_tensorboard(
        self, arguments: MakeArguments, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = "vllm_mtp.training.arguments.is_tensorboard_available"
        monkeypatch.setattr(name, lambda: False)
        arguments(report_to="none")
        with pytest.raises(MTPError, match=r"vllm-mtp\[train\].*report_to: none"):
            arguments(report_to=["tensorboard"])


class TestFlags:
    def test_dashes_and_underscores(self) -> None:
        assert load("--learning-rate", "0.5").learning_rate == 0.5
        assert load("--learning_rate", "0.5").learning_rate == 0.5

    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            # Misspelt: an unknown flag is to blame, not what it left unset.
            (["--targe", "t", "--wings", "2"], "--targe t --wings 2"),
            (["--learning_rat", "1"], "--learning_rat 1"),  # an abbreviation
            (["stray"], "stray"),
        ],
    )
    def test_unknown_ones_are_wrong_usage(
        self, flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["train", *flags])
        assert stop.value.code == 2
        assert f"unrecognized arguments: {named}\n" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "flags",
        [
            ["--learning_rate", "1", "run.yaml"],
            ["--lora_modules", "q_proj", "run.yml"],
            ["a.yaml", "run.yaml"],
        ],
    )
    def test_a_file_comes_first(
        self, flags: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["train", *flags])
        assert stop.value.code == 2
        assert f"{flags[-1]}: expected one YAML file" in capsys.readouterr().err


class TestMissingPackages:
    def fail(self, monkeypatch: pytest.MonkeyPatch, error: ImportError) -> int:
        def run(self: Train) -> int:
            raise error

        monkeypatch.setattr(Train, "run", run)
        return main(["train", *NEEDED])

    @pytest.mark.parametrize(
        "error",
        [
            ModuleNotFoundError("No module named 'datasets'", name="datasets"),
            ModuleNotFoundError("No module named 'x'", name="datasets.arrow"),
            ImportError("the `Trainer` requires `accelerate>=1.1.0`: Please run `pip`"),
        ],
    )
    def test_the_extra_is_named(
        self,
        error: ImportError,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert self.fail(monkeypatch, error) == 1
        package = "datasets" if error.name else "accelerate"
        said = capsys.readouterr().err
        assert f"needs the package {package}: pip install 'vllm-mtp[train]'" in said

    @pytest.mark.parametrize("name", ["vllm_mtp.datasets", "vllm"])
    def test_other_imports_are_shown_as_they_are(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ModuleNotFoundError):
            self.fail(monkeypatch, ModuleNotFoundError("no", name=name))
