# SPDX-License-Identifier: Apache-2.0
"""A drafter that is trained beside its target, by TRL's trainers and transformers'."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, TrainerCallback

from tests.tiny_targets import VOCAB_SIZE, make_tiny
from tests.training.co_trained import (
    ARGUMENTS,
    ROWS,
    SETTINGS,
    model_of,
    plain_trainer,
)
from vllm_mtp import co_train
from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.checkpoint import load_drafter, read_config, save_drafter
from vllm_mtp.drafter.options import DrafterOptions
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.errors import MTPError
from vllm_mtp.evaluation.blocks import run_in_torch
from vllm_mtp.evaluation.compare import stage_error
from vllm_mtp.evaluation.probe import read_probe
from vllm_mtp.sharing.provenance import read_provenance, training_prompts
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import load_frozen
from vllm_mtp.torch_host.new_drafter import new_drafter
from vllm_mtp.training.co_training.batch_texts import texts_of
from vllm_mtp.training.co_training.callback import CoTraining
from vllm_mtp.training.co_training.folder import STATE_FILE
from vllm_mtp.training.co_training.measures import measure
from vllm_mtp.training.loss_module import LossModule, LossPlan

K = 3
TEACHER_OF_ALL = {"learning_rate": 1e-2, "teacher_tokens": 0}


@pytest.fixture(scope="module")
def drafter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a layer and an option of every kind."""
    options = DrafterOptions(
        lora_rank=2,
        lora_modules=["q_proj", "down_proj"],
        markov_rank=4,
        boundary_hidden="first",
        draft_vocab_size=200,
        dtype="float32",
    )
    made = new_drafter(tiny_llama, "shared:0,own:2,3", K, options, range(200))
    return save_drafter(made, tmp_path_factory.mktemp("drafters") / "old")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token: ``t0`` to ``t511``."""
    words = {f"t{number}": number for number in range(VOCAB_SIZE)}
    made = Tokenizer(models.WordLevel(words, unk_token="t0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "t0", "eos_token": "t1", "pad_token": "t2"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def words(start: int, count: int) -> str:
    """Counting in threes: what a drafter can learn."""
    return " ".join(f"t{5 + (start + 3 * i) % 150}" for i in range(count))


PAIRS = [
    {"prompt": words(7 * n, 4) + " ", "completion": words(7 * n + 12, 12 + n % 4)}
    for n in range(16)
]


def sft(model: Any, out: Path, tokenizer: Any, peft: Any = None, **more: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(1)
    return SFTTrainer(
        model,
        args=SFTConfig(output_dir=str(out), **ARGUMENTS | more),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        peft_config=peft,
    )


def grpo(model: Any, out: Path, tokenizer: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(1)
    more = {"num_generations": 2, "max_completion_length": 8, "max_steps": 2}
    return GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions],
        args=GRPOConfig(output_dir=str(out), **ARGUMENTS | more),
        train_dataset=Dataset.from_list([{"prompt": p["prompt"]} for p in PAIRS]),
        processing_class=tokenizer,
    )


def weights(module: Any) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def losses(trainer: Any, name: str = "drafter/loss") -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def outcomes(folder: Path, model: Any) -> tuple[Any, Any]:
    """What the drafter in a folder computed when it was saved, and what it does now."""
    probe = read_probe(folder)
    assert probe is not None
    bound = BoundDrafter(load_drafter(folder), HFTarget(model))
    return probe.run, run_in_torch(bound, probe.texts)


def assert_same_run(found: Any, expected: Any) -> None:
    assert torch.equal(found.outcome.drafts, expected.outcome.drafts)
    for name, sketch in expected.outcome.stages.items():
        assert stage_error(found.outcome.stages[name], sketch) < 1e-3, name


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_the_trainer_does_not_notice(
    kind: str, tiny_llama: Path, drafter: Path, tokenizer: Any, tmp_path: Path
) -> None:
    make = sft if kind == "sft" else grpo
    alone = make(model_of(tiny_llama), tmp_path / "alone", tokenizer)
    alone.train()
    trainer = make(model_of(tiny_llama), tmp_path / "both", tokenizer)
    before = torch.get_rng_state()
    co_training = co_train(trainer, drafter, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)
    started = weights(co_training.drafter)
    trainer.train()

    assert same(weights(trainer.model), weights(alone.model))
    assert not same(weights(trainer.model), weights(model_of(tiny_llama)))
    assert not same(weights(co_training.drafter), started)
    own = {"step_time"}
    for line, wanted in zip(
        trainer.state.log_history, alone.state.log_history, strict=True
    ):
        kept = {n: v for n, v in wanted.items() if n not in own and "_per_" not in n}
        kept.pop("train_runtime", None)
        assert {name: line[name] for name in kept} == kept
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    for name in ("teacher_forced", "loss", "entropy"):
        for position in range(1, K + 1):
            assert losses(trainer, f"drafter/{name}_position_{position}")
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_a_checkpoint_holds_both(
    tiny_llama: Path, drafter: Path, tmp_path: Path
) -> None:
    steps = {"max_steps": 16, "save_steps": 16}
    trainer = plain_trainer(model_of(tiny_llama), tmp_path / "mine", **steps)
    co_train(trainer, drafter, **SETTINGS)
    trainer.train()
    first, *_, last = losses(trainer)
    assert last < 0.8 * first
    checkpoint = tmp_path / "mine" / "checkpoint-16"
    folder = checkpoint / "mtp_placeholder"
    # What an engine compares, and by what it finds a drafter.
    facts = TargetFacts.from_folder(checkpoint)
    config = read_config(folder)
    config.target.require_same(facts)
    assert config.target.weights_fingerprint == facts.weights_fingerprint
    assert config.target.name == "mine"
    then, now = outcomes(folder, load_frozen(checkpoint, "float32", "cpu"))
    assert_same_run(now, then)

    papers = read_provenance(folder)
    assert papers is not None
    assert papers.training is not None
    assert papers.training.beside == f"Trainer of transformers {transformers_version()}"
    assert papers.training.arguments["own_optimizer"] == "muon"
    assert papers.training.optimizer_steps == 16
    assert papers.parent is not None
    assert papers.parent.name == "old"
    # Its texts are not those of `generate`, so no prompt is known to be new to it.
    assert training_prompts(folder).held_out is None
    card = (folder / "README.md").read_text("utf-8")
    assert "beside its target" in card

    trainer.save_model(str(tmp_path / "elsewhere"))
    again = load_drafter(tmp_path / "elsewhere" / "mtp_placeholder")
    assert same(weights(again), weights(load_drafter(folder)))
    assert not (tmp_path / "elsewhere" / STATE_FILE).exists()


def transformers_version() -> str:
    import transformers

    return transformers.__version__


def test_a_resumed_run_equals_an_unbroken_one(
    tiny_llama: Path, drafter: Path, tmp_path: Path
) -> None:
    def run(out: Path, checkpoint: str | bool | None = None) -> CoTraining:
        trainer = plain_trainer(model_of(tiny_llama), out, save_steps=2)
        made = co_train(trainer, drafter, **SETTINGS | {"lr_scheduler_type": "cosine"})
        trainer.train(checkpoint)
        return made

    whole = run(tmp_path / "out")
    expected = weights(whole.drafter)
    half = tmp_path / "out" / "checkpoint-2"
    resumed = run(tmp_path / "other", str(half))
    assert same(weights(resumed.drafter), expected)
    papers = read_provenance(tmp_path / "other" / "checkpoint-4" / "mtp_placeholder")
    assert papers is not None
    assert papers.training is not None
    assert papers.training.resumed_from_step == 2
    assert papers.training.optimizer_steps == 4

    trainer = plain_trainer(model_of(tiny_llama), tmp_path / "adamw")
    co_train(trainer, drafter)
    with pytest.raises(MTPError, match=r"checkpoint-2: its optimizer trains other"):
        trainer.train(str(half))
    other = save_drafter(new_drafter(tiny_llama, "own:3", K), tmp_path / "drafter")
    trainer = plain_trainer(model_of(tiny_llama), tmp_path / "third")
    co_train(trainer, other)
    with pytest.raises(MTPError, match=r"drafter_state.pt: layers: the checkpoint's"):
        trainer.train(str(half))
    (tmp_path / "out" / "checkpoint-4" / STATE_FILE).unlink()
    with pytest.raises(MTPError, match="written without co_train"):
        run(tmp_path / "out", True)


def test_the_drafter_goes_back_with_the_target(
    tiny_llama: Path, drafter: Path, tmp_path: Path
) -> None:
    trainer = plain_trainer(
        model_of(tiny_llama),
        tmp_path / "out",
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first one is the best
    )
    made = co_train(trainer, drafter, **SETTINGS)
    trainer.train()
    best = tmp_path / "out" / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    saved = load_drafter(best / "mtp_placeholder")
    assert same(weights(made.drafter), weights(saved))


def test_adapters_of_the_target_are_read(
    tiny_llama: Path, drafter: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """What is served is the target with its adapters merged, or with them beside it."""
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    runs = []
    for name in ("alone", "both"):
        trainer = sft(
            model_of(tiny_llama),
            tmp_path / name,
            tokenizer,
            peft=peft,
            learning_rate=0.05,  # or the adapters do nothing yet
        )
        if name == "both":
            co_train(trainer, drafter, **SETTINGS)
        trainer.train()
        runs.append(trainer)
    assert same(weights(runs[0].model), weights(runs[1].model))
    folder = tmp_path / "both" / "checkpoint-4" / "mtp_placeholder"
    merged = runs[1].model.merge_and_unload().eval().requires_grad_(False)
    then, now = outcomes(folder, merged)
    assert_same_run(now, then)
    read_config(folder).target.require_same(TargetFacts.from_folder(tiny_llama))


@pytest.fixture(scope="module")
def noise_drafter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = DrafterOptions(
        placeholder_kind="noise", lora_rank=2, lora_modules=["q_proj"], dtype="float32"
    )
    made = new_drafter(tiny_llama, "shared:all", K, options)
    return save_drafter(made, tmp_path_factory.mktemp("drafters") / "noise")


@pytest.mark.parametrize(("checkpointing", "bf16"), [(False, True), (True, False)])
def test_a_model_that_was_trained_before(
    checkpointing: bool, bf16: bool, tiny_llama: Path, drafter: Path, tmp_path: Path
) -> None:
    """LoRA acts in copies of the target's modules, made when training is on."""
    model = model_of(tiny_llama).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    trainer = plain_trainer(model, tmp_path, max_steps=1, logging_steps=1, bf16=bf16)
    co_train(trainer, drafter, **SETTINGS)
    assert model.training
    trainer.train()
    assert len(losses(trainer)) == 1


def test_noise_tokens_follow_the_target(
    tiny_llama: Path, noise_drafter: Path, tmp_path: Path
) -> None:
    model = model_of(tiny_llama)
    trainer = plain_trainer(
        model, tmp_path / "out", learning_rate=0.1, logging_steps=1, max_steps=2
    )
    made = co_train(trainer, noise_drafter, **TEACHER_OF_ALL)
    assert made.drafter.placeholders is not None
    assert not made.drafter.placeholders.requires_grad
    before = weights(made.drafter.layers)
    trainer.train()
    assert not same(weights(made.drafter.layers), before)

    folder = tmp_path / "out" / "checkpoint-2"
    saved = load_drafter(folder / "mtp_placeholder")
    noise, placeholders = saved.config.noise, saved.placeholders
    assert noise is not None
    assert placeholders is not None
    target = HFTarget(load_frozen(folder, "float32", "cpu"))
    now = target.embed(torch.tensor(noise.token_ids))
    assert torch.equal(placeholders, now)
    old = load_drafter(noise_drafter).placeholders
    assert old is not None
    assert not torch.allclose(placeholders, old)


def test_measures_use_the_noise_that_is_kept(
    tiny_llama: Path, noise_drafter: Path
) -> None:
    made = load_drafter(noise_drafter)
    host = HFTarget(load_frozen(tiny_llama, "float32", "cpu"))
    text = {
        "index": 0,
        "input_ids": torch.tensor(ROWS[0]["input_ids"]),
        "loss_spans": [(4, 16)],
    }
    # Other steps draw other noise; with all anchors nothing else is drawn.
    first, second = (
        measure(LossModule(made, host, LossPlan()), [text], n) for n in (1, 2)
    )
    assert torch.equal(first, second)


def test_what_is_frozen_in_a_drafter_stays_so(tiny_llama: Path, tmp_path: Path) -> None:
    mine = new_drafter(tiny_llama, "own:3", K)
    assert mine.placeholders is not None
    mine.placeholders.requires_grad_(False)
    frozen, other = mine.placeholders.clone().float(), weights(mine.layers)
    trainer = plain_trainer(model_of(tiny_llama), tmp_path / "out", max_steps=1)
    co_train(trainer, mine, weight_decay=0.1)
    trainer.train()
    assert torch.equal(mine.placeholders, frozen)
    assert not same(weights(mine.layers), [w.float() for w in other])


def test_a_step_without_a_text_is_none(
    tiny_llama: Path, drafter: Path, tmp_path: Path
) -> None:
    trainer = plain_trainer(model_of(tiny_llama), tmp_path / "out", max_steps=1)
    made = co_train(trainer, drafter, **SETTINGS | {"max_text_tokens": 4})
    before = weights(made.drafter)
    trainer.train()
    assert same(weights(made.drafter), before)
    papers = read_provenance(tmp_path / "out" / "checkpoint-1" / "mtp_placeholder")
    assert papers is not None
    assert papers.training is not None
    assert papers.training.optimizer_steps == 0


def test_accumulated_batches_are_one(
    tiny_llama: Path, drafter: Path, tmp_path: Path
) -> None:
    """Also where one has fewer labels than the other."""
    rows = [text[: 16 - 3 * (n % 3)] for n, text in enumerate(ROWS["input_ids"])]

    def run(batch: int, batches: int) -> tuple[list[float], list[torch.Tensor]]:
        trainer = plain_trainer(
            model_of(tiny_llama, dropout=0.0),
            tmp_path / str(batch),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=batches,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            train_sampling_strategy="sequential",
        )
        trainer.train_dataset = Dataset.from_list([{"input_ids": r} for r in rows])
        trainer.data_collator = padded
        made = co_train(trainer, drafter, learning_rate=1e-3, max_grad_norm=1e9)
        kept: list[torch.Tensor] = []

        def keep(*_: Any) -> None:
            kept.extend(w.grad.clone() for w in made.drafter.parameters())

        trainer.add_callback(
            Begun(lambda: made._optimizer.register_step_pre_hook(keep))
        )
        trainer.train()
        return losses(trainer), kept

    (at_once, gradients), (in_parts, others) = run(4, 1), run(1, 4)
    assert in_parts == pytest.approx(at_once, rel=1e-4)
    for found, expected in zip(others, gradients, strict=True):
        assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_the_example_trains_both(
    tiny_llama: Path,
    drafter: Path,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its training alone, on a small target; what is gained needs an engine."""
    target = Path(shutil.copytree(tiny_llama, tmp_path / "target"))
    tokenizer.save_pretrained(target)
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    (target / "chat_template.jinja").write_text(template, "utf-8")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")  # the example sets it for good
    path = Path(__file__).parents[2] / "examples" / "co_train.py"
    example = runpy.run_path(str(path))
    pairs = [(pair["prompt"], pair["completion"]) for pair in PAIRS[:4]]
    out = tmp_path / "out"
    example["fine_tune"](target, drafter, pairs, out, 2)
    saved = out / example["METHOD"]
    assert not same(weights(load_drafter(saved)), weights(load_drafter(drafter)))
    read_config(saved).target.require_same(TargetFacts.from_folder(out))
    papers = read_provenance(saved)
    assert papers is not None
    assert papers.training is not None
    assert papers.training.optimizer_steps == 2


class Begun(TrainerCallback):
    """Calls something once training has begun."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._call()


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """As `Causal`, with texts of several lengths."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    labels = pad_sequence(ids, batch_first=True, padding_value=-100)
    labels[:, :4] = -100
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": labels,
        "attention_mask": mask,
    }


@pytest.mark.slow  # two processes import everything anew
def test_two_processes_train_as_one(
    tiny_llama: Path, drafter: Path, tmp_path: Path
) -> None:
    trainer = plain_trainer(model_of(tiny_llama, dropout=0.0), tmp_path / "one")
    # All anchors: where a text's blocks stand goes with its process.
    co_train(trainer, drafter, **SETTINGS | {"anchors_per_text": 64})
    trainer.train()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    settings = [str(tiny_llama), str(drafter), str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.training.co_trained", *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout
    checkpoints = [tmp_path / name / "checkpoint-4" for name in ("one", "two")]
    one, two = (weights(load_drafter(c / "mtp_placeholder")) for c in checkpoints)
    started = weights(load_drafter(drafter))
    for found, expected, start in zip(two, one, started, strict=True):
        # Both optimizers make whole steps of small gradients, and so of a rounding.
        away, moved = ((expected - other).float().norm() for other in (found, start))
        assert away <= 0.1 * moved
    states = [checkpoint / "trainer_state.json" for checkpoint in checkpoints]
    histories = [json.loads(s.read_text("utf-8"))["log_history"] for s in states]
    for line, wanted in zip(*histories, strict=True):
        names = [name for name in wanted if name.startswith("drafter/")]
        assert {n: line[n] for n in names} == pytest.approx(
            {n: wanted[n] for n in names}, rel=1e-2
        )


def test_some_steps_only(tiny_llama: Path, drafter: Path, tmp_path: Path) -> None:
    trainer = plain_trainer(model_of(tiny_llama), tmp_path / "out", logging_steps=1)
    made = co_train(trainer, drafter, every=2)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [
        1, 2, 3, 4,
    ]  # fmt: skip
    assert len(losses(trainer)) == len(losses(trainer, "drafter/loss_position_1")) == 2
    papers = read_provenance(made.save(tmp_path / "by-hand"))
    assert papers is not None
    assert papers.training is not None
    assert papers.training.optimizer_steps == 2


class TestBatches:
    """The texts are the same, however a trainer packs them."""

    EXAMPLES = (
        {"input_ids": [9, 8, 7, 6, 5], "labels": [-100, -100, 7, 6, 5]},
        {"input_ids": [4, 3, 2], "labels": [4, 3, 2]},
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, 4]},  # none to learn
    )
    EXPECTED = (
        {"index": 10, "input_ids": [9, 8, 7, 6, 5], "loss_spans": [(2, 5)]},
        {"index": 11, "input_ids": [4, 3, 2], "loss_spans": [(0, 3)]},
    )

    @pytest.mark.parametrize("settings", [{}, {"padding_free": True}])
    def test_as_sft_collates_them(self, settings: dict[str, Any]) -> None:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        batch = DataCollatorForLanguageModeling(
            pad_token_id=2, pad_to_multiple_of=8, **settings
        )([dict(example) for example in self.EXAMPLES])
        texts = texts_of(batch, 100, first=10)
        if settings:  # the first token of a packed text is never learnt
            assert texts[1]["loss_spans"] == [(1, 3)]
            texts[1]["loss_spans"] = [(0, 3)]
        assert self.in_lists(texts) == list(self.EXPECTED)

    def test_completions_with_tools(self) -> None:
        batch = {
            "prompt_ids": torch.tensor([[2, 9, 8], [7, 7, 7]]),
            "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
            "completion_ids": torch.tensor([[5, 6, 40, 7, 8, 2], [1, 2, 3, 4, 5, 6]]),
            "completion_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [0] * 6]),
            "tool_mask": torch.tensor([[1, 1, 0, 1, 1, 1], [1] * 6]),
        }
        (text,) = self.in_lists(texts_of(batch, 100))
        assert text["input_ids"] == [9, 8, 5, 6, 40, 7, 8]
        assert text["loss_spans"] == [(2, 4), (5, 7)]
        (cut,) = self.in_lists(texts_of(batch, 5))
        assert (cut["input_ids"], cut["loss_spans"]) == ([9, 8, 5, 6, 40], [(2, 4)])

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            ({"input_ids": torch.ones(1, 4)}, r"no \['labels'\]"),
            ({"pixel_values": None, "input_ids": None}, "images or sounds"),
            (
                {"input_ids": torch.ones(1, 4), "labels": torch.ones(1, 4)},
                "tells its texts from padding",
            ),
            (
                {
                    "input_ids": torch.ones(1, 4),
                    "labels": torch.ones(1, 4),
                    "attention_mask": torch.ones(1, 1, 4, 4),
                },
                "tells its texts from padding",
            ),
        ],
    )
    def test_others_are_refused(self, batch: dict[str, Any], message: str) -> None:
        with pytest.raises(MTPError, match=message):
            texts_of(batch, 100)

    def in_lists(self, texts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [text | {"input_ids": text["input_ids"].tolist()} for text in texts]


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"lr": 1.0}, "lr: got 1.0, Extra inputs"),
            ({"learning_rate": 0}, "learning_rate: got 0, expected a number greater"),
            ({"every": 0}, "every: got 0"),
            ({"ce_weight": 0, "kl_weight": 0}, "one of them above 0"),
            ({"teacher_tokens": 201}, "at most the 200 tokens"),
            ({"teacher_tokens": -1}, "teacher_tokens: got -1"),
        ],
    )
    def test_settings(
        self,
        settings: dict[str, Any],
        message: str,
        tiny_llama: Path,
        drafter: Path,
        tmp_path: Path,
    ) -> None:
        trainer = plain_trainer(model_of(tiny_llama), tmp_path)
        with pytest.raises(MTPError, match=message):
            co_train(trainer, drafter, **settings)

    def test_twice(self, tiny_llama: Path, drafter: Path, tmp_path: Path) -> None:
        trainer = plain_trainer(model_of(tiny_llama), tmp_path)
        co_train(trainer, drafter)
        with pytest.raises(MTPError, match="already"):
            co_train(trainer, drafter)

    def test_drafters(self, tiny_llama: Path, tiny_qwen3: Path, tmp_path: Path) -> None:
        trainer = plain_trainer(model_of(tiny_llama), tmp_path)
        with pytest.raises(MTPError, match="no such file"):
            co_train(trainer, tmp_path / "nothing")
        with pytest.raises(MTPError, match="does not fit the target"):
            co_train(trainer, new_drafter(tiny_qwen3, "own:3", K))
        with pytest.raises(MTPError, match="nothing to train"):
            co_train(trainer, new_drafter(tiny_llama, "shared:all", 1))
        noise = DrafterOptions(placeholder_kind="noise")
        only_noise = new_drafter(tiny_llama, "shared:all", K, noise).requires_grad_()
        for without_lora in (only_noise, save_drafter(only_noise, tmp_path / "noise")):
            with pytest.raises(MTPError, match="nothing to train"):
                co_train(trainer, without_lora)

    @pytest.mark.parametrize(
        ("layers", "settings", "message"),
        [
            ("own:3", {"teacher_tokens": 10**6}, "teacher_tokens: got 1000000"),
            ("shared:all", {"own_optimizer": "muon"}, "no own layer to train"),
            ("own:3", {}, "all of its weights are frozen"),
        ],
    )
    def test_a_refused_drafter_is_as_it_was(
        self,
        layers: str,
        settings: dict[str, Any],
        message: str,
        tiny_llama: Path,
        tmp_path: Path,
    ) -> None:
        mine = new_drafter(tiny_llama, layers, K, DrafterOptions(dtype="bfloat16"))
        mine = mine.bfloat16().requires_grad_(bool(settings))
        config = mine.config
        trainer = plain_trainer(model_of(tiny_llama), tmp_path)
        with pytest.raises(MTPError, match=message):
            co_train(trainer, mine, **settings)
        assert mine.config is config
        kinds = {(w.dtype, w.requires_grad) for w in mine.parameters()}
        assert kinds == {(torch.bfloat16, bool(settings))}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: setattr(t, "is_fsdp_enabled", True), "uses FSDP"),
            (lambda t: setattr(t, "is_deepspeed_enabled", True), "uses DeepSpeed"),
            (lambda t: setattr(t.args, "_n_gpu", 2), "several GPUs in one process"),
            (lambda t: setattr(t.args, "fp16", True), "fp16 is on"),
            (lambda t: t.model.half(), "loaded in float16"),
            (lambda t: setattr(t, "model_init", lambda: t.model), "model_init"),
            (
                lambda t: [
                    setattr(t.args, name, True)
                    for name in ("load_best_model_at_end", "save_only_model")
                ],
                "save_only_model",
            ),
        ],
    )
    def test_ways_to_train(
        self,
        change: Callable[[Any], None],
        message: str,
        tiny_llama: Path,
        drafter: Path,
        tmp_path: Path,
    ) -> None:
        trainer = plain_trainer(model_of(tiny_llama), tmp_path)
        change(trainer)
        with pytest.raises(MTPError, match=message):
            co_train(trainer, drafter)

    def test_targets(self, tiny_llama: Path, drafter: Path, tmp_path: Path) -> None:
        dynamic = make_tiny("llama_dynamic", tmp_path / "dynamic")
        trainer = plain_trainer(model_of(dynamic), tmp_path / "out")
        with pytest.raises(MTPError, match="scales its RoPE by the text's length"):
            co_train(trainer, new_drafter(dynamic, "own:3", K))
        tokens = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        prefixed = get_peft_model(model_of(tiny_llama), tokens)
        trainer = plain_trainer(prefixed, tmp_path / "out")
        with pytest.raises(MTPError, match="an adapter of PREFIX_TUNING"):
            co_train(trainer, drafter)
        headed = get_peft_model(
            model_of(tiny_llama), LoraConfig(r=2, target_modules=["lm_head"])
        )
        trainer = plain_trainer(headed, tmp_path / "out")
        with pytest.raises(MTPError, match="LM head has an adapter"):
            co_train(trainer, drafter)
