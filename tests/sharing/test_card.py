# SPDX-License-Identifier: Apache-2.0
"""The card: read back as the hub reads it, and as a user copies from it."""

import ast
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

import checkpoints_spec.goldens
from checkpoints_spec.goldens import GOLDENS
from vllm_mtp.cli.inspect import describe
from vllm_mtp.drafter.checkpoint import read_config
from vllm_mtp.drafter.cost import draft_cost
from vllm_mtp.drafter.layer_spec import parse_layers
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.evaluation.offline import OfflineResult
from vllm_mtp.sharing.card import is_made, layers_text, license_of, make_card
from vllm_mtp.sharing.provenance import DrafterProvenance, without_paths


def blocks(card: ModelCard, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", card.text, re.DOTALL)


def served(card: ModelCard) -> tuple[str, dict[str, object]]:
    command, _ = blocks(card, "bash")
    program, verb, target, flag, settings = shlex.split(command)
    assert (program, verb, flag) == ("vllm", "serve", "--speculative-config")
    return target, json.loads(settings)


def test_data_block_and_numbers_come_back(
    drafter: Drafter, provenance: DrafterProvenance, evaluation: OfflineResult
) -> None:
    config = drafter.config
    made = make_card(config, provenance, evaluation, repo_id="jane/my-drafter")
    card = ModelCard(str(made))
    assert card.data.to_dict() == {
        "base_model": "owner/target",
        "library_name": "vllm-mtp",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "vllm", "vllm-mtp", "mtp-placeholder"],
    }
    assert "# my-drafter\n" in card.text
    cost = draft_cost(config)
    for text in [
        # By hand: 1 + (130 + 50) / 200 and 1 + (300 + 100) / 400.
        "length 1.900 in simulated greedy decoding; teacher-forced length 2.000.",
        "| chat     |         4 |    400 |    100 |      0.800 |      0.400 |",
        "over 8 answers (split `held_out`) of 800 tokens",
        "bonus token",
        "the target's own answers to `prompts.jsonl`",
        f"{cost.draft_parameters:,}, {cost.relative_weights:.2f} of a target step's",
        "0.5 x cross-entropy",
        "train: 1,234 answers, 77,777 tokens of answers",
        "| Started | 2030-01-31 10:00 UTC |",
        "| Time | 1.50 hours |",
        "| `ce_weight` | `0.5` |",
        "`stage-1`",
        "vllm-mtp check ./my-drafter --target owner/target",
    ]:
        assert text in card.text, text
    assert "KL divergence" not in card.text, "its weight is 0"


@pytest.mark.parametrize("repo_id", [None, "jane/d"])
def test_commands_can_be_copied(drafter: Drafter, repo_id: str | None) -> None:
    card = make_card(drafter.config, name="it's mine", repo_id=repo_id)
    target, settings = served(card)
    assert settings == {
        "method": "mtp_placeholder",
        "model": repo_id or "./it's mine",
        "num_speculative_tokens": drafter.config.num_speculative_tokens,
    }
    (python,) = blocks(card, "python")
    _, assign, make = ast.parse(python).body
    assert isinstance(assign, ast.Assign)
    assert ast.literal_eval(assign.value) == settings
    assert json.dumps(target) in ast.unparse(make).replace("'", '"')


def test_works_with_nothing_known(drafter: Drafter) -> None:
    card = ModelCard(str(make_card(drafter.config)))
    assert "How it was made is not recorded" in card.text
    assert "Not measured" in card.text
    assert "license" not in card.data.to_dict()
    assert "## Training" not in card.text


def test_untrained_is_said(drafter: Drafter, provenance: DrafterProvenance) -> None:
    bare = provenance.model_copy(update={"training": None, "data": None})
    text = make_card(drafter.config, bare).text
    assert "untrained" in text
    assert "## Training" not in text
    assert "## Made with" in text


@pytest.mark.parametrize("prompts", ["sharegpt:later", "sharegpt:tasks", "self:2000"])
def test_the_source_of_the_prompts_is_said(
    prompts: str, drafter: Drafter, provenance: DrafterProvenance
) -> None:
    record = json.loads(provenance.to_json())
    source: dict[str, object] = {"prompts": prompts, "shard": "2/8"}
    if prompts.startswith("self:"):
        source["writing"] = {"temperature": 0.8, "max_tokens": 1024}
    record["data"]["generation"]["settings"]["source"] = source
    made = without_paths(DrafterProvenance.model_validate(record))
    text = make_card(drafter.config, made).text
    assert f"the target's own answers to `{prompts}`, part 2/8 of them" in text
    assert (
        "written by the target itself, sampled with temperature 0.8, top_p 1.0, up to "
        "1,024 tokens" in text
    ) == prompts.startswith("self:")


def test_training_beside_the_target_is_said(
    drafter: Drafter, provenance: DrafterProvenance
) -> None:
    assert provenance.training is not None
    beside = provenance.training.model_copy(update={"beside": "SFTTrainer of trl 1.16"})
    text = make_card(
        drafter.config,
        provenance.model_copy(update={"training": beside, "data": None}),
    ).text
    assert "beside its target, on the same batches, by SFTTrainer of trl 1.16." in text
    assert "Settings, as `co_train` takes them" in text


def test_a_folder_is_no_base_model(
    drafter: Drafter, provenance: DrafterProvenance
) -> None:
    target = provenance.target.model_copy(update={"name": "folder"})
    named = provenance.model_copy(update={"target": target})
    card = make_card(drafter.config, named)
    assert "base_model" not in card.data.to_dict()
    assert served(card)[0] == "folder"


def test_license_of_the_argument_wins(
    drafter: Drafter, provenance: DrafterProvenance
) -> None:
    card = str(make_card(drafter.config, provenance, license="mit"))
    assert license_of(card) == "mit"
    assert is_made(card)
    assert not is_made("# A person's text")


@pytest.mark.parametrize(
    "spec", ["shared:0-9,own:28,29", "own:0,7,14", "own:3,shared:3,1-2", "own:5,5"]
)
def test_layers_are_told_as_init_takes_them(spec: str) -> None:
    layers = parse_layers(spec, 30)
    config = SimpleNamespace(layers=layers)  # a layer's kind and number are enough
    assert parse_layers(layers_text(config), 30) == layers  # type: ignore[arg-type]


GOLDEN = Path(checkpoints_spec.goldens.__file__).parent / "golden"


@pytest.mark.parametrize("name", GOLDENS)
def test_layers_are_listed_as_init_takes_them(name: str) -> None:
    config = read_config(GOLDEN / name)
    listed = parse_layers(layers_text(config), config.target.num_hidden_layers)
    assert [(item.kind, item.target_layer) for item in listed] == [
        (layer.kind, getattr(layer, "target_layer", None)) for layer in config.layers
    ]


# What `inspect` and the card say of each kind, and what neither may.
SAID: dict[str, tuple[list[str], list[str], list[str]]] = {
    "shared-lora": (
        [
            "tokens per draft 4 (1 anchor, 3 placeholders)",
            "placeholders     trained vectors",
            "boundary hidden  none",
            "LM head          the target's",
            "each of its 2 layers reads a target layer's, 64 bytes per token",
            "reads            of the prefix, all of it",
        ],
        ["It reads the target's own KV cache", "One forward drafts up to 4 tokens"],
        ["times over"],
    ),
    "heads": (
        [
            "tokens per draft 3 (every one a row of the boundary hidden state)",
            "placeholders     none",
            "boundary hidden  the last one",
            "mlp, reads no cache, square, weights for each position",
            "LM head          3 of its own, one for each position",
            "its own LM heads among them",
            "none of its own: no layer reads the target's",
            "of the prefix, nothing: no layer reads a cache",
        ],
        ["It reads a hidden state of the target's, no cache,", "MLP, square: [0]"],
        ["0 bytes per token of prefix", "trained vectors", "all of it"],
    ),
    "block-attention": (
        [
            "reads the block alone, RoPE of target layer 1",
            "none of its own: no layer reads the target's",
        ],
        [
            "It reads the token before the draft, no cache, and keeps none of its own.",
            "attends to the block alone: [0]",
            "nothing: no layer reads a cache",
        ],
        ["0 bytes per token of prefix", "all of it"],
    ),
    "chain": (
        [
            "tokens per draft 4 (a chain: one forward for each, on the token drafted",
            "placeholders     none",
            "of shared layers, 4 times over",
            "2 of its 3 layers read a target layer's, 4 times over, 256 bytes per",
        ],
        ["One forward for each drafts up to 4 tokens"],
        ["placeholders)"],
    ),
    "bidirectional": (
        ["(1 anchor, 3 placeholders, bidirectional)", "2 of its 3 layers read"],
        ["1 anchor, 3 placeholders, bidirectional"],
        [],
    ),
    "full-rank": (
        ["full rank on q_proj, k_proj, o_proj, gate_proj"],
        ["full rank: [0, 1]"],
        [],
    ),
    "extra-rows": (
        ["tokens per draft 3 (1 anchor, 2 extra rows, 2 placeholders)"],
        ["1 anchor, 2 extra rows, 2 placeholders"],
        [],
    ),
    "mixed-streams": (
        [
            "boundary hidden  a learnt mix of the streams behind target layers [2, 0];",
            "; the streams behind target layers [1], by layers bound there",
        ],
        ["a learnt mix of the streams behind target layers [2, 0]"],
        [],
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_every_kind_of_drafter_is_told(name: str) -> None:
    config = read_config(GOLDEN / name)
    inspected, card = describe(config), make_card(config).text
    in_inspect, in_card, in_none = SAID[name]
    for text in in_inspect:
        assert text in inspected, inspected
    for text in in_card:
        assert text in card, card
    for text in in_none:
        assert text not in inspected
        assert text not in card
