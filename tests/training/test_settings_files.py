# SPDX-License-Identifier: Apache-2.0
"""The shipped settings files are those that made the shipped drafters, and those for
large targets run."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto import AutoModelForCausalLM

from tests.tiny_answers import write_answers
from tests.tiny_targets import VOCAB_SIZE
from vllm_mtp.cli.main import _load
from vllm_mtp.drafter.checkpoint import read_config
from vllm_mtp.installed import installed_folder
from vllm_mtp.sharing.provenance import read_provenance
from vllm_mtp.training.record import told_arguments
from vllm_mtp.training.run import train

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


LARGE = ("qwen3-8b-own-layers", "qwen3-8b-uno")
# As many layers as the recipes' target, and their own layers are copies of its.
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def small_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "qwen3"
    config = AutoConfig.from_pretrained(EXAMPLES / "qwen3-8b.config.json", **SMALL)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_for_a_large_target_runs(
    name: str, small_qwen3: Path, tmp_path: Path
) -> None:
    """With another target, fewer steps and texts, and nothing else."""
    texts = [
        [(7 * number + 3 * place * place) % VOCAB_SIZE for place in range(24)]
        for number in range(8)
    ]
    data = write_answers(tmp_path / "data", small_qwen3, texts, [4] * len(texts))
    fewer = {
        "target": small_qwen3,
        "data": data,
        "output_dir": tmp_path / "out",
        "max_steps": 3,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 1,
        "ce_start_steps": 2 if name == LARGE[0] else 0,
        "curriculum_steps": 1 if name == LARGE[1] else 0,
        "eval_texts": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if name == LARGE[1]:
        fewer["mask_token_id"] = VOCAB_SIZE  # that of the recipe is out of this one
    file = EXAMPLES / f"{name}.yaml"
    flags = [f"--{key}={value}" for key, value in fewer.items()]
    args = _load("train", [str(file), *flags])
    train(args, small_qwen3)
    config = read_config(tmp_path / "out")
    assert config.num_speculative_tokens == args.num_speculative_tokens
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text("utf-8"))
    steps = [line for line in state["log_history"] if "loss" in line]
    parts = [{key for key in line if key.startswith("loss_")} for line in steps]
    whole = {"loss_tv", "loss_ce"} if args.ce_weight else {"loss_tv"}
    if name == LARGE[0]:
        assert parts == [{"loss_ce"}, {"loss_ce"}, whole]
        assert [layer.target_layer for layer in config.layers] == [0, 9, 18, 26, 35]
        assert config.uses_boundary_hidden
    else:
        assert parts == [whole] * 3
        (lora,) = {layer.lora for layer in config.layers}
        assert (lora.rank, lora.alpha, len(lora.modules)) == (128, 2048, 7)
        assert config.noise is not None


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_has_as_many_texts_per_step_as_its_paper(name: str) -> None:
    args = _load("train", [str(EXAMPLES / f"{name}.yaml"), *NEEDED])
    texts = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert texts == {"qwen3-8b-own-layers": 512, "qwen3-8b-uno": 128}[name]
    assert args.bf16
