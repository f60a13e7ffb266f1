# SPDX-License-Identifier: Apache-2.0
"""Probes in plain torch: what is kept, and what shows that a drafter is another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec import goldens
from checkpoints_spec.goldens import GOLDENS, TOKEN_IDS, golden_target
from tests.evaluation.drafter_faults import FAULTS, Fault
from tests.tiny_targets import VOCAB_SIZE
from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.checkpoint import load_drafter, read_config, save_drafter
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.model import Drafter
from vllm_mtp.errors import CheckpointError, MTPError
from vllm_mtp.evaluation.blocks import (
    choose_texts,
    run_in_torch,
    sketched_positions,
    stage_names,
    tries_window,
)
from vllm_mtp.evaluation.compare import (
    LIMITS,
    compare_files,
    compare_outcomes,
    compare_states,
    worst_gap,
)
from vllm_mtp.evaluation.probe import (
    PROBE_FILE,
    Probe,
    flat_config,
    make_probe,
    read_probe,
    write_probe,
)
from vllm_mtp.evaluation.sketch import relative_errors, sketch
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter

ROWS: list[dict[str, Any]] = [
    {
        "input_ids": [(37 * i * i + 11 * row) % VOCAB_SIZE for i in range(40 + row)],
        "loss_spans": [[10, 20], [25, 38]],
    }
    for row in range(6)
]
LIMIT = LIMITS["float32"]


def bind(folder: Path, target: Path) -> BoundDrafter:
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    return BoundDrafter(load_drafter(folder), HFTarget(model))


@pytest.fixture
def make(tiny_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a drafter with a probe."""

    def _make(layers: str = "shared:0,own:1,2", **options: Any) -> Path:
        settings = DrafterOptions(dtype="float32", **options)
        drafter = new_drafter(tiny_llama, layers, 4, settings)
        folder = save_drafter(drafter, tmp_path / "drafter")
        write_probe(folder, bind(folder, tiny_llama), ROWS)
        return folder

    return _make


def probe_of(folder: Path) -> Probe:
    probe = read_probe(folder)
    assert probe is not None
    return probe


class TestSketch:
    def test_tells_how_far_two_states_are_apart(self) -> None:
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(64, 300, generator=generator)
        noise = torch.randn(64, 300, generator=generator) * 0.01
        errors = relative_errors(sketch(states + noise), sketch(states))
        assert errors.min() > 0.005
        assert errors.max() < 0.02

    def test_a_state_that_is_not_finite_is_infinitely_far(self) -> None:
        good = sketch(torch.ones(2, 8))
        bad = sketch(torch.tensor([[float("nan")] * 8, [float("inf")] * 8]))
        assert relative_errors(bad, good).isinf().all()
        assert relative_errors(good, good).eq(0).all()

    def test_never_changes(self) -> None:
        """A probe outlives versions of everything."""
        states = torch.arange(1.0, 11.0)[None]
        assert sketch(states)[0, :6].tolist() == PINNED
        assert sketch(states)[0, 16].item() == pytest.approx(385**0.5)


PINNED = [-1.0, 45.0, -7.0, -1.0, -9.0, -1.0]


class TestChoice:
    def config(self, tiny_llama: Path, k: int = 4) -> DrafterConfig:
        return new_drafter(tiny_llama, "own:0", k, DrafterOptions()).config

    def test_blocks_stand_where_the_drafter_learnt(self, tiny_llama: Path) -> None:
        texts = choose_texts(ROWS, self.config(tiny_llama), 512)
        assert [len(lens) for lens in texts.prefix_lens] == [6] * 4
        for ids, lens in zip(texts.token_ids, texts.prefix_lens, strict=True):
            assert set(lens) <= {*range(10, 19), *range(25, 37)}
            assert len(ids) == max(lens) + 1

    def test_no_two_blocks_can_be_taken_for_each_other(self, tiny_llama: Path) -> None:
        texts = choose_texts([ROWS[0]] * 4, self.config(tiny_llama), 512)
        keys = [block.key for block in texts.blocks()]
        assert len(set(keys)) == len(keys) > 12

    def test_without_loss_spans_any_position_will_do(self, tiny_llama: Path) -> None:
        texts = choose_texts([{"input_ids": [1, 2, 3]}], self.config(tiny_llama), 512)
        assert (texts.token_ids, texts.prefix_lens) == (((1, 2),), ((1,),))

    def test_a_window_is_tried_where_the_target_is_long_enough(
        self, tiny_llama: Path
    ) -> None:
        whole = self.config(tiny_llama)
        config = whole.model_copy(update={"prefix_window": 50})
        texts = choose_texts(ROWS, config, 512)
        *others, last = texts.prefix_lens
        assert last == (385,)
        assert len(texts.token_ids[-1]) == 386
        assert tries_window(texts, config)
        assert not tries_window(texts, whole)
        for short in (choose_texts(ROWS, whole, 512), choose_texts(ROWS, config, 388)):
            assert list(short.prefix_lens) == others
            assert not tries_window(short, config)

    def test_blocks_fit_into_the_targets_positions(self, tiny_llama: Path) -> None:
        texts = choose_texts(ROWS, self.config(tiny_llama), 20)
        assert max(max(lens) for lens in texts.prefix_lens) + 4 <= 20

    def test_no_usable_row_is_refused(self, tiny_llama: Path) -> None:
        with pytest.raises(MTPError, match="no row has 3 tokens"):
            choose_texts([{"input_ids": [1, 2]}], self.config(tiny_llama), 512)

    def test_positions_are_spread(self) -> None:
        assert sketched_positions(1) == [0]
        assert sketched_positions(4) == [0, 1, 2, 3]
        assert sketched_positions(64) == [0, 9, 18, 27, 36, 45, 54, 63]


def test_a_probe_stays_small(tmp_path: Path) -> None:
    """A deep drafter with a weight everywhere."""
    from tests.tiny_targets import make_tiny_llama

    target = make_tiny_llama(tmp_path / "deep", num_hidden_layers=30)
    settings = DrafterOptions(
        dtype="float32",
        lora_rank=1,
        lora_modules=["q_proj", "o_proj", "gate_proj"],
        boundary_hidden="all",
    )
    layers = "shared:0-14,own:" + ",".join(map(str, range(15, 30)))
    folder = save_drafter(new_drafter(target, layers, 8, settings), tmp_path / "d")
    path = write_probe(folder, bind(folder, target), ROWS)
    assert path.stat().st_size < 300_000


def test_a_probe_is_read_as_it_was_written(
    make: Callable[..., Path], tiny_llama: Path
) -> None:
    folder = make()
    bound, probe = bind(folder, tiny_llama), probe_of(folder)
    run = run_in_torch(bound, probe.texts)
    limits = LIMIT
    levels = [
        compare_files(probe, folder),
        compare_states(probe, run, limits),
        compare_outcomes("torch", probe, run.outcome, read_config(folder), limits),
    ]
    assert [level.first_fault for level in levels] == [None] * 3
    assert list(run.outcome.stages) == list(stage_names(bound.drafter.config).values())
    assert len(run.outcome.drafts) == len(probe.texts.blocks()) == 24
    assert probe.dtype == "float32"
    assert probe.versions["torch"]
    assert load_drafter(folder).config == bound.drafter.config
    assert (folder / PROBE_FILE).stat().st_mode == (
        folder / "config.json"
    ).stat().st_mode


def test_a_probe_holds_the_drafter_in_memory_not_the_folder(
    make: Callable[..., Path], tiny_llama: Path
) -> None:
    """What training has is the truth, whatever was saved."""
    folder = make()
    bound = bind(folder, tiny_llama)
    bound.drafter.layers[1].q_proj.weight.data[0, 0] += 1.0
    seen: list[int] = []
    trace = bound.trace = lambda stage, rows: seen.append(stage)
    write_probe(folder, bound, ROWS)
    assert (bound.trace, seen) == (trace, [])
    fault = compare_files(probe_of(folder), folder).first_fault
    assert fault is not None
    assert fault.where == "tensor layers.1.q_proj.weight"


def test_a_probe_may_be_older_than_a_key(make: Callable[..., Path]) -> None:
    """Such a key is at its default, unless somebody has changed the folder."""
    folder = make(boundary_hidden="first")
    probe = probe_of(folder)
    del probe.config["layers.2.bridge"]
    assert compare_files(probe, folder).first_fault is None
    text = (folder / "config.json").read_text("utf-8")
    assert text.count('"boundary_hidden": true') == 1
    del probe.config["layers.1.boundary_hidden"]
    fault = compare_files(probe, folder).first_fault
    assert fault is not None
    assert fault.where == "config key layers.1.boundary_hidden"


def test_a_folder_without_a_probe(tmp_path: Path) -> None:
    assert read_probe(tmp_path) is None


@pytest.mark.parametrize("damage", ["cut", "other format", "tensor missing"])
def test_a_broken_probe_is_refused(damage: str, make: Callable[..., Path]) -> None:
    path = make() / PROBE_FILE
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:500])
    else:
        tensors = load_file(path)
        tensors.pop("gaps")
        kind = "vllm-mtp probe 1" if damage == "tensor missing" else "probe 2"
        path.unlink()
        save_file(tensors, path, metadata={"format": kind})
    with pytest.raises(CheckpointError, match=str(path)):
        read_probe(path.parent)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_located(
    name: str, make: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    """By the files alone, and by computing alone."""
    fault: Fault = FAULTS[name]
    folder = make("shared:0,own:1,2")
    target = shutil.copytree(tiny_llama, tmp_path / "target")
    fault.make(folder, target)
    probe = probe_of(folder)
    run = run_in_torch(bind(folder, target), probe.texts)
    config = read_config(folder)
    levels = {
        "files": compare_files(probe, folder),
        "target": compare_states(probe, run, LIMIT),
        "torch": compare_outcomes("torch", probe, run.outcome, config, LIMIT),
    }
    found = {
        level: first.where
        for level, result in levels.items()
        if (first := result.first_fault)
    }
    assert found == fault.found


def test_a_changed_lora_shows_at_the_placeholders(
    make: Callable[..., Path], tiny_llama: Path
) -> None:
    folder = make("shared:all", lora_rank=2, lora_modules=["v_proj"])
    bound = bind(folder, tiny_llama)
    bound.drafter.layers[2].lora["v_proj"].b.data.fill_(0.1)
    probe = probe_of(folder)
    run = run_in_torch(bound, probe.texts)
    level = compare_outcomes("torch", probe, run.outcome, read_config(folder), LIMIT)
    fault = level.first_fault
    assert fault is not None
    assert fault.where.startswith("layer 2 ")
    now = run.outcome.stages["layer 2"]
    errors = relative_errors(now, probe.run.outcome.stages["layer 2"])
    assert errors[:, 0].max() == 0  # the anchors


def test_a_drafter_of_another_shape_is_no_stack_trace(
    make: Callable[..., Path], tiny_llama: Path
) -> None:
    probe = probe_of(make("own:1,2"))
    now = run_in_torch(bind(make("own:1"), tiny_llama), probe.texts)
    config = read_config(make("own:1"))
    level = compare_outcomes("torch", probe, now.outcome, config, LIMIT)
    assert level.first_fault is not None
    assert level.first_fault.fault == "probed 4, now 3"
    assert compare_states(probe, now, LIMIT).first_fault is None


def test_informative_facts_are_no_part_of_the_config(tiny_llama: Path) -> None:
    def flat(name: str) -> dict[str, Any]:
        drafter: Drafter = new_drafter(tiny_llama, "own:1", 2, DrafterOptions())
        content = json.loads(drafter.config.model_dump_json())
        content["target"] |= {"name": name, "weights_fingerprint": None}
        return flat_config(DrafterConfig.model_validate_json(json.dumps(content)))

    assert flat("a") == flat("b")
    assert flat("a")["layers.0.target_layer"] == 1


def test_a_draft_may_differ_where_the_probe_shows_a_tie() -> None:
    expected = torch.tensor([[1, 2, 3], [4, 5, 6]])
    gaps = torch.tensor([[0.5, 0.1, 0.9], [0.2, 0.3, 0.4]])
    drafts = torch.tensor([[1, 9, 9], [4, 5, 6]])
    assert worst_gap(expected, expected, gaps, is_chained=False) == 0
    assert worst_gap(drafts, expected, gaps, is_chained=False) == pytest.approx(0.9)
    # With the Markov correction the third position follows from the second.
    assert worst_gap(drafts, expected, gaps, is_chained=True) == pytest.approx(0.1)


@pytest.mark.parametrize("name", GOLDENS)
def test_every_kind_of_drafter_is_probed_and_read_back(
    name: str, tmp_path: Path
) -> None:
    """Also chains, whose rows run one after the other, and rows that draft nothing."""
    folder = Path(goldens.__file__).parent / "golden" / name
    drafter = load_drafter(folder, dtype=torch.float32)
    save_drafter(drafter, tmp_path)
    bound = BoundDrafter(drafter, HFTarget(golden_target(name)))
    write_probe(tmp_path, bound, [{"input_ids": [*TOKEN_IDS, 1, 5, 9]}])
    found = read_probe(tmp_path)
    assert found is not None
    expected = make_probe(bound, found.texts).run
    assert found.run.outcome.drafts.equal(expected.outcome.drafts)
    for stage, rows in expected.outcome.stages.items():
        torch.testing.assert_close(found.run.outcome.stages[stage], rows)
