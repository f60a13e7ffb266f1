# SPDX-License-Identifier: Apache-2.0
"""Presets of published systems, and the page that shows what came of them."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.auto import AutoModelForCausalLM

from tests.tiny_answers import write_answers
from tools.systems import gather, report, speed
from tools.systems.encode import encode
from tools.systems.gather import (
    TOGETHER,
    curve_of,
    differences,
    labels_of_text,
    minutes_of,
    require_its_data,
)
from tools.systems.presets import BASE, ROOT, Preset, preset_of, presets, settings_of
from tools.systems.reference import SETS, Reference
from tools.systems.runs import Run, of_each, trained_runs
from tools.systems.speed import best, predicted
from tools.systems.train import budget_of, seconds_per_step, train
from vllm_mtp.bench.cpu import this_cpu
from vllm_mtp.bench.step_profile import StepProfile
from vllm_mtp.bench.steps import StepsWanted
from vllm_mtp.cli.main import _load
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.errors import MTPError
from vllm_mtp.sharing.provenance import data_record
from vllm_mtp.torch_host.without_weights import BareTarget, drafter_config
from vllm_mtp.training.arguments import DrafterTrainingArguments
from vllm_mtp.training.states_folder import StatesFolder

SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
SYSTEMS = (
    *("apple-gated-lora", "bita", "bpd", "deepseek-chain", "dmtd", "glide", "i-dlm"),
    *("longspark", "medusa", "medusa-shared-head", "meta-heads", "mtp-d", "orthrus"),
    *("ours", "parallelspec", "pass", "self-distill-mtp", "set-block", "uno", "whs"),
)
ARMS = (
    *("arm-bidirectional", "arm-chain", "arm-hidden", "arm-kv", "arm-kv-hidden"),
    "arm-medusa",
)
# What differs between the arms that read differently, and nothing else.
WHAT_IS_READ = {"own_attention", "boundary_hidden"}


@pytest.fixture(scope="module")
def configs() -> dict[str, DrafterConfig]:
    """Of every preset's drafter for SmolLM2-135M, without weights."""
    target = BareTarget(SMOLLM2)
    found = {}
    for preset in presets().values():
        args = arguments_of(preset)
        k = args.num_speculative_tokens
        found[preset.name] = drafter_config(target, args.layers, k, args)
    return found


def arguments_of(preset: Preset) -> DrafterTrainingArguments:
    needed = ["--target", "t", "--data", "d", "--use_cpu", "true"]
    return _load("train", [str(preset.file), *needed])


def test_every_system_has_its_settings() -> None:
    assert tuple(presets()) == (*SYSTEMS, *ARMS)


@pytest.mark.parametrize("name", [*SYSTEMS, *ARMS])
def test_settings_hold_what_all_have_in_common(name: str) -> None:
    common, own = settings_of(BASE), presets()[name].settings()
    assert common.items() <= own.items()
    # Whether it is a system's own or common to all is to be seen in the file.
    text = presets()[name].file.read_text("utf-8")
    before, _, behind = text.partition("# Common to all systems, as in base.yaml.\n")
    assert set(map(str.strip, behind.splitlines())) == {
        line.strip()
        for line in BASE.read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    }
    assert "layers:" in before


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_head_says_where_it_comes_from_and_what_was_changed(name: str) -> None:
    preset = presets()[name]
    head = preset.file.read_text("utf-8").partition("\nlayers:")[0]
    if preset.arxiv is None:
        assert preset.source == "this package"
    else:
        assert "Changed: " in head


def test_drafters_are_the_systems(configs: dict[str, DrafterConfig]) -> None:
    """What makes each system what it is, as the drafter has it."""
    shared = {"apple-gated-lora", "bita", "i-dlm", "orthrus", "pass"}
    shared |= {"self-distill-mtp", "set-block", "uno"}
    assert {n for n, c in configs.items() if c.shares_whole_target} == shared
    assert {n for n, c in configs.items() if c.are_heads} == {
        *("arm-medusa", "bpd", "medusa", "medusa-shared-head", "whs")
    }
    assert {n for n, c in configs.items() if c.chain} == {
        *("arm-chain", "deepseek-chain", "dmtd", "glide", "mtp-d")
    }
    assert {n for n, c in configs.items() if c.block_mask == "bidirectional"} == {
        *("arm-bidirectional", "longspark", "set-block")
    }
    assert {n for n, c in configs.items() if c.noise} == {"uno"}
    assert {n for n, c in configs.items() if c.lm_head == "own"} == {
        *("arm-medusa", "medusa")
    }
    assert configs["bita"].extra_rows == 4
    assert configs["longspark"].boundary_sources == (0, 7, 15, 22, 29)
    assert configs["arm-hidden"].readers == ()
    assert not configs["arm-kv"].uses_boundary_hidden
    for config in configs.values():
        assert config.num_speculative_tokens == 4


def test_a_drafter_of_every_system_can_be_built(
    configs: dict[str, DrafterConfig],
) -> None:
    with torch.device("meta"):
        sizes = {
            name: sum(weight.numel() for weight in Drafter(config).parameters())
            for name, config in configs.items()
        }
    assert min(sizes.values()) == sizes["pass"] == 3 * 576
    # The arms that are compared have the same weights, but for what reads the state.
    assert sizes["arm-kv-hidden"] == sizes["arm-hidden"] == sizes["arm-bidirectional"]
    assert sizes["arm-kv-hidden"] - sizes["arm-kv"] == 7 * 576 * 576


def test_arms_differ_in_one_thing() -> None:
    whole = presets()["arm-kv-hidden"].settings()
    for name, changed in (
        ("arm-kv", WHAT_IS_READ),
        ("arm-hidden", WHAT_IS_READ),
        ("arm-bidirectional", {"block_mask"}),
        ("arm-chain", {"chain", "markov_rank", "markov_lr_scale"}),
    ):
        other = presets()[name].settings()
        differing = {key for key in whole | other if whole.get(key) != other.get(key)}
        assert differing <= changed, name
        assert differing, name


def test_the_arm_is_the_system_of_its_name() -> None:
    assert presets()["arm-medusa"].settings() == presets()["medusa"].settings()


def test_ours_are_the_settings_of_cheap() -> None:
    cheap = settings_of(ROOT / "examples" / "train" / "cheap.yaml")
    beside = {"warmup_steps"}  # of a run from nothing
    wanted = {k: v for k, v in cheap.items() if k not in beside}
    assert wanted.items() <= presets()["ours"].settings().items()


def test_a_run_belongs_to_the_longest_name_that_it_begins_with() -> None:
    found = {
        run: preset.name if (preset := preset_of(run)) else None
        for run in ("arm-kv", "arm-kv-2", "arm-kv-hidden-1", "pass", "passage", "x")
    }
    assert found == {
        "arm-kv": "arm-kv",
        "arm-kv-2": "arm-kv",
        "arm-kv-hidden-1": "arm-kv-hidden",
        "pass": "pass",
        "passage": None,
        "x": None,
    }


class TestBudget:
    def test_steps_fill_the_minutes(self) -> None:
        assert budget_of(15, 4.0).steps == 225
        assert budget_of(0.01, 4.0).steps == 2

    def test_a_short_run_keeps_the_shape_of_a_long_one(self) -> None:
        settings = {"warmup_steps": 20, "ce_start_steps": 60}
        assert budget_of(15, 4.0).overrides(settings) == {"max_steps": 225}
        assert budget_of(4, 4.0).overrides(settings) == {
            "max_steps": 60,
            "warmup_steps": 12,
            "ce_start_steps": 20,
        }
        assert budget_of(4, 4.0).overrides({}) == {"max_steps": 60}


@pytest.fixture
def deep_target(tmp_path: Path) -> Path:
    """A tiny target with as many layers and tokens as the presets name."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=30,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=24_600,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def test_states_that_are_encoded_before_are_all_that_a_system_reads(
    deep_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = torch.randint(24_000, (6, 24), generator=torch.manual_seed(1)).tolist()
    data = write_answers(tmp_path / "data", deep_target, texts, [4] * 6)
    states = tmp_path / "states"
    encode(str(deep_target), str(data), states)
    assert list(states.rglob("*.safetensors"))

    def no_more(*_: Any, **__: Any) -> None:
        raise AssertionError("a text was encoded while a system trained")

    monkeypatch.setattr(StatesFolder, "_write", no_more)
    given = {"target": deep_target, "data": data, "states_folder": states}
    # Keys and values behind a stream that is no other system's.
    assert seconds_per_step(str(presets()["dmtd"].file), given) > 0


class TestLabels:
    def test_each_block_has_as_many_as_there_are_tokens(self) -> None:
        # Anchors 0 .. 4 of six tokens: 4, 4, 3, 2 and 1 labels.
        assert labels_of_text([6], k=4, most_blocks=64) == 14
        assert labels_of_text([6], k=4, most_blocks=2) == pytest.approx(14 * 2 / 5)
        assert labels_of_text([1, -3, 0], k=4, most_blocks=2) == 0
        assert labels_of_text([3, 3], k=1, most_blocks=64) == 4

    def test_a_curve_has_a_point_for_each_evaluation(self) -> None:
        log = [
            {"step": 0, "eval_teacher_forced_length": 1.0},
            {"step": 25, "loss": 3.0},
            {"step": 50, "eval_teacher_forced_length": 1.5},
            {"step": 50, "eval_teacher_forced_length": 1.5},  # the last, once more
        ]
        assert curve_of(log, 100.0) == [(0, 1.0), (5000, 1.5)]


def test_an_answer_is_compared_with_that_of_the_target_alone() -> None:
    row = {"input_ids": [9, 9, 1, 2, 3], "loss_spans": [[2, 5]], "category": "x"}
    likeliest = ({1: -0.1, 7: -4.0}, {2: -0.7, 8: -0.7005}, {3: -0.1})
    reference = Reference("float32", (row,), (likeliest,))
    verdicts = [
        reference.compare(0, answer).verdict
        for answer in ([1, 2, 3], [1, 8, 5], [7, 2, 3], [1, 2])
    ]
    assert verdicts == ["equal", "tie", "different", "different"]


def sets(*lengths: float) -> dict[str, Any]:
    return {
        name: {
            "acceptance_length": lengths[-1],
            "acceptance_length_by_k": list(lengths),
            "acceptance_per_position": [0.5, 0.25, 0.125, 0.0625],
            "drafts": 100,
        }
        for name in SETS
    }


def made_up(preset: str, label: str = "", **more: Any) -> dict[str, Any]:
    known = {
        "preset": preset,
        "label": label,
        "steps": 225,
        "overrides": {"max_steps": 225},
        "minutes": 15.4,
        "labels": 412_345,
        "trained_parameters": 1_234_567,
        "draft_weights": 0.4321,
        "is_served": True,
        "predicted": None,
        "curve": [],
        "offline": sets(1.4, 1.6, 1.7, 1.75),
    }
    return known | more


RESULTS = {
    "runs": {
        "medusa": made_up(
            "medusa",
            served={
                "sets": sets(1.87),
                "answers": {"equal": 511, "tie": 1},
            },
            cost={"draft": 0.25, "step": 1.5},
            predicted=1.2467,
            speed={"ratio": {"median": 1.19, "low": 1.1, "high": 1.3}},
        ),
        "bita": made_up("bita", is_served=False),
        "arm-kv-1": made_up("arm-kv", "1", curve=[(0, 1.0), (9_000, 1.5)]),
    },
    "differences": [
        {
            "one": "arm-kv-hidden",
            "other": "arm-kv",
            "label": "1",
            "set": "held out",
            "estimate": 0.1234,
            "low": -0.01,
            "high": 0.2,
            "prompts": 64,
        }
    ],
}


def page(results: dict[str, Any]) -> str:
    return report.renewed(report.PAGE.read_text("utf-8"), results)


def line_of(text: str, beginning: str) -> str:
    (line,) = (x for x in text.splitlines() if x.startswith(f"| {beginning} | ["))
    return line


class TestReport:
    def test_a_line_says_what_was_measured(self) -> None:
        line = line_of(page(RESULTS), "Medusa")
        assert line == (
            "| Medusa | [arXiv 2401.10774](https://arxiv.org/abs/2401.10774) | 1.40 | "
            "1.60 | 1.70 | 1.87 | 0.50 0.25 0.12 0.06 | 1.87 | 1.23 M | 0.25 | 1.25 | "
            "1.19 | vLLM | 511 of 512 equal, 1 float ties | 15 | 412 k |"
        )

    def test_what_was_not_measured_is_not_shown_as_if_it_were(self) -> None:
        line = line_of(page(RESULTS), "BiTA")
        assert "| 1.75 | 1.23 M | (0.43) |  |  | torch (not served) |  | 15 |" in (
            line.replace("| | ", "|  | ").replace("| | ", "|  | ")
        )
        pass_line = line_of(page(RESULTS), "PaSS")
        assert not any(char.isdigit() for char in pass_line.partition(") |")[2])

    def test_every_preset_has_its_line_and_its_command(self) -> None:
        text = page(report.NOTHING)
        for preset in presets().values():
            assert sum(x.startswith(f"| {preset.title} |") for x in text.splitlines())
            assert f"`vllm-mtp train {preset.command_file}`" in text
        assert "vllm-mtp train examples/systems/bita.yaml --max-steps=225`" in page(
            RESULTS
        )

    def test_says_on_which_cpu_systems_were_trained_and_timed(self) -> None:
        runs = {
            "bita": made_up("bita", cpus={"train": "A (amx)", "cost": "B"}),
            "pass": made_up("pass", cpus={"train": "A (amx)", "cost": "A (amx)"}),
            "uno": made_up(
                "uno",
                cpus={"cost": "B"},
                cost={"draft": 0.2, "step": 1.2, "dtype": "bfloat16"},
            ),
            "arm-kv-1": made_up("arm-kv", "1", cpus={"train": "B"}),
        }
        text = page({"runs": runs, "differences": []})
        _, _, systems = text.partition("<!-- generated: systems -->")
        said = [x for x in systems.partition("<!--")[0].splitlines() if x[:2] == "- "]
        assert said == [
            "- Drafts timed in bfloat16 on B: uno",
            "- Drafts timed on A (amx): pass",
            "- Drafts timed on B: bita",
            "- Trained on A (amx): bita, pass",
        ]

    def test_differences_name_both_sides(self) -> None:
        assert (
            "| cache and hidden state | cache alone | 1 | held out | +0.123 | "
            "-0.010 to +0.200 | 64 |" in page(RESULTS)
        )

    def test_plots_are_shown_where_there_is_something_to_plot(
        self, tmp_path: Path
    ) -> None:
        for name in ("systems.png", "systems-arms.png"):
            assert f"({name})" in page(RESULTS)
            assert f"({name})" not in page(report.NOTHING)
        assert report.points_of(RESULTS) == [("medusa", 0.25, 1.87)]
        assert [run["label"] for run in report.curves_of(RESULTS)] == ["1"]
        report.plot_systems(RESULTS, tmp_path / "systems.png")
        report.plot_arms(RESULTS, tmp_path / "arms.png")
        for file in tmp_path.iterdir():
            assert file.stat().st_size > 10_000

    def test_the_page_is_what_its_numbers_give(self) -> None:
        results = json.loads(report.DATA.read_text("utf-8"))
        text = report.PAGE.read_text("utf-8")
        assert page(results) == text, "python -m tools.systems report"

    def test_plain_torch_counts_what_vllm_does(
        self, configs: dict[str, DrafterConfig]
    ) -> None:
        """As the page says: so lengths of fewer drafted tokens need no vLLM. Of the
        whole target int8 rounds away some first tokens, which torch never loses."""
        runs = json.loads(report.DATA.read_text("utf-8"))["runs"].values()
        both = [run for run in runs if "served" in run and "offline" in run]
        assert both
        for run in both:
            whole = configs[run["preset"]].shares_whole_target
            least, most = (0.01, 0.06) if whole else (-0.01, 0.01)
            for name in SETS:
                in_vllm, in_torch = (
                    part[name]["acceptance_length"]
                    for part in (run["served"]["sets"], run["offline"])
                )
                assert least < in_torch - in_vllm < most, run["preset"]

    def test_a_page_without_marks_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no markers <!-- generated: systems"):
            report.renewed("# Systems\n", RESULTS)

    def test_new_results_replace_those_of_the_same_name(self) -> None:
        new = {
            "runs": {"bita": made_up("bita", steps=7)},
            "differences": [RESULTS["differences"][0] | {"estimate": 0.5}],  # type: ignore[index]
        }
        both = report.merged(RESULTS, new)
        assert set(both["runs"]) == set(RESULTS["runs"])
        assert both["runs"]["bita"]["steps"] == 7
        assert [d["estimate"] for d in both["differences"]] == [0.5]


class TestDifferences:
    """Two arms of two trainings each: 40 prompts of each set, 10 drafts each."""

    @pytest.fixture
    def runs(self, tmp_path: Path, configs: dict[str, DrafterConfig]) -> list[Run]:
        accepted = {
            **{"arm-kv-hidden-s1": 12, "arm-kv-hidden-s2": 16, "arm-kv-hidden-s3": 40},
            **{"arm-kv-s1": 10, "arm-kv-s2": 11},
        }
        found = []
        for name, count in accepted.items():
            preset = preset_of(name)
            assert preset is not None
            run = Run(tmp_path / name, preset)
            run.folder.mkdir()
            config = configs[preset.name].model_dump_json()
            (run.folder / "config.json").write_text(config)
            # Other prompts: as many less as the held-out ones have more.
            rows = [[SETS[0], count, 10]] * 40 + [[SETS[1], 20 - count, 10]] * 40
            run.keep("offline", {"rows": rows})
            found.append(run)
        return found

    def test_are_of_each_training_and_of_all_that_both_have(
        self, runs: list[Run]
    ) -> None:
        found = {
            (line["set"], line["label"]): pytest.approx(line["estimate"])
            for line in differences(runs)
        }
        held_out, unseen = SETS
        assert found == {
            (held_out, "s1"): 0.2,
            (held_out, "s2"): 0.5,
            (held_out, TOGETHER): 0.35,
            (unseen, "s1"): -0.2,
            (unseen, "s2"): -0.5,
            (unseen, TOGETHER): -0.35,
        }

    def test_one_training_is_not_taken_together(self, runs: list[Run]) -> None:
        first = [run for run in runs if run.label == "s1"]
        assert [line["label"] for line in differences(first)] == ["s1", "s1"]


class TestRuns:
    @pytest.fixture
    def folder(self, tmp_path: Path, configs: dict[str, DrafterConfig]) -> Path:
        """Drafters without weights."""
        for name in ("medusa", "bita", "ours", "arm-kv-1"):
            preset = preset_of(name)
            assert preset is not None
            (tmp_path / name).mkdir()
            config = configs[preset.name].model_dump_json()
            (tmp_path / name / "config.json").write_text(config)
        (tmp_path / "unknown").mkdir()
        (tmp_path / "unknown" / "config.json").write_text("{}")
        return tmp_path

    def test_are_found_by_their_names(self, folder: Path) -> None:
        named = partial(trained_runs, folder)
        assert [run.name for run in named([])] == ["bita", "medusa", "ours", "arm-kv-1"]
        assert [run.name for run in named(["arm-kv", "ours"])] == ["ours", "arm-kv-1"]
        with pytest.raises(MTPError, match="no trained run of these"):
            named(["pass"])

    def test_know_whether_vllm_can_run_them(self, folder: Path) -> None:
        served = {run.name: run.is_served for run in trained_runs(folder, [])}
        assert served["medusa"]
        assert served["ours"]
        assert not served["bita"]

    def test_the_fastest_are_those_with_most_tokens_per_time(
        self, folder: Path
    ) -> None:
        runs = {run.name: run for run in trained_runs(folder, [])}
        for name, length, step in (
            ("medusa", 2.0, 1.25),
            ("ours", 2.4, 1.2),
            ("arm-kv-1", 9.0, 1.0),
        ):
            runs[name].keep("served", {"sets": sets(length)})
            runs[name].keep("cost", {"draft": 0.2, "step": step})
        assert predicted(runs["medusa"].results()) == pytest.approx(1.6)
        assert predicted(runs["bita"].results()) is None
        fastest = best(runs.values(), 8)
        assert [run.name for run in fastest] == ["ours", "medusa"], "arms are no system"
        assert [run.name for run in best(runs.values(), 1)] == ["ours"]

    def test_are_timed_anew_in_another_type_alone(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[object, str]] = []

        def profiles(_: object, wanted: StepsWanted) -> list[StepProfile]:
            asked.append((wanted.settings["dtype"], wanted.side.name))
            drafts = wanted.side.speculative_config is not None
            ms = 12.0 + drafts * len(asked)
            parts = {"draft: layers": ms - 12}
            return [StepProfile(wanted.side.name, 1, 40, ms, ms, parts)]

        def cost_of(dtype: str, rounds: int) -> Any:
            asked.clear()
            speed.cost(runs, "target", Reference("float32", (row,), ()), dtype, rounds)
            for run in runs[1:]:
                assert len(run.results()["cost"]["rounds"]) == rounds
            return runs[0].results()["cost"]

        monkeypatch.setattr(speed, "alone", profiles)
        row = {"input_ids": [1, 2, 3], "loss_spans": [[2, 3]]}
        runs = trained_runs(folder, ["medusa", "ours"])
        first = {"draft": 2 / 12, "step": 14 / 12}
        found = cost_of("bfloat16", 1)
        assert found == {**first, "dtype": "bfloat16", "rounds": [first]}
        sides = [
            ("bfloat16", name) for name in ("none", "medusa k=4", "none", "ours k=4")
        ]
        assert asked == sides, "all runs, one behind the other"
        found = cost_of("bfloat16", 3)
        assert asked == sides * 2
        assert found["rounds"] == [first, first, {"draft": 0.5, "step": 1.5}]
        assert (found["draft"], found["step"]) == (first["draft"], first["step"])
        cost_of("bfloat16", 3)
        assert not asked
        assert cost_of("float32", 1) == {**first, "dtype": "float32", "rounds": [first]}

    def test_have_no_time_where_their_clock_began_anew(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = trained_runs(folder, ["arm-kv"])[0]
        known = SimpleNamespace(wall_seconds=600.0, resumed_from_step=0)
        provenance = SimpleNamespace(training=known)
        monkeypatch.setattr(gather, "read_provenance", lambda _: provenance)
        assert minutes_of(run, {}) == 10
        known.resumed_from_step = 250
        assert minutes_of(run, {}) is None
        assert minutes_of(run, {"cpu_seconds": 900.0}) == 15

    def test_are_reported_with_the_answers_that_they_were_trained_on(
        self,
        folder: Path,
        tmp_path: Path,
        tiny_llama: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        run = trained_runs(folder, ["ours"])[0]
        own, other = (
            str(write_answers(tmp_path / f"data-{n}", tiny_llama, [[*range(n)]], [2]))
            for n in (8, 9)
        )
        require_its_data(run, own)  # a drafter without a provenance may have any
        provenance = SimpleNamespace(data=data_record(own))
        monkeypatch.setattr(gather, "read_provenance", lambda _: provenance)
        require_its_data(run, own)
        with pytest.raises(MTPError, match=r"^ours: was trained on data-8, got --data"):
            require_its_data(run, other)

    def test_are_measured_behind_one_that_fails(self, folder: Path) -> None:
        seen = []

        def measure(run: Run) -> None:
            if run.name == "medusa":
                raise RuntimeError("the engine died")
            seen.append(run.name)

        with pytest.raises(MTPError, match="not measured: medusa; "):
            of_each(trained_runs(folder, []) * 2, measure)
        assert seen == ["bita", "ours", "arm-kv-1"] * 2

    def test_go_on_with_their_own_budget_alone(self, folder: Path) -> None:
        run = Run(folder / "pass", presets()["pass"])
        run.keep("train", {"asked": {"minutes": 15.0}, "overrides": {}})
        with pytest.raises(MTPError, match=r"begun with \{'minutes': 15.0\}, got"):
            train(run.preset, "target", "data", folder, 20.0, None, None)

    def test_keep_what_each_command_measured(self, folder: Path) -> None:
        run = Run(folder / "ours", presets()["ours"])
        run.keep("cost", {"draft": 1})
        run.keep("speed", {"ratio": 2})
        run.keep("cost", {"draft": 3})
        cpu = str(this_cpu())
        assert run.results() == {
            "cost": {"draft": 3},
            "speed": {"ratio": 2},
            "cpus": {"cost": cpu, "speed": cpu},
        }
