# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp plan``."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from vllm_mtp.cli.main import _load, main
from vllm_mtp.cli.plan import PlanCommand, bare_target
from vllm_mtp.training.plan import GIB, RESERVE
from vllm_mtp.training.step_memory import step_memory
from vllm_mtp.training.step_shape import step_shape

SETTINGS = """\
layers: own:0,1,3
num_speculative_tokens: 4
markov_rank: 8
per_device_train_batch_size: 8
gradient_accumulation_steps: 2
anchors_per_text: 256
max_text_tokens: 1024
states_budget_gb: 0
bf16: true
num_train_epochs: 2
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a target, without weights."""
    folder = tmp_path_factory.mktemp("target")
    Qwen3Config(
        vocab_size=5000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(SETTINGS)
    return file


def planned(
    capsys: pytest.CaptureFixture[str], *flags: str, code: int = 0
) -> dict[str, Any]:
    assert main(["plan", *flags, "--json"]) == code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_what_it_says_is_what_the_formulas_say(
    settings: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(settings), "--target", str(target)]
    found = planned(
        capsys,
        *flags,
        *("--num-texts", "1000", "--num-devices", "2"),
        *("--device-memory", "24", "--mean-answer-tokens", "300"),
    )
    args: PlanCommand = _load("plan", flags)
    shape = step_shape(bare_target(str(target)), args)
    memory = step_memory(shape, 2)
    peak = sum(memory.values())
    free = 24 * GIB - RESERVE
    assert found["memory"] == {**memory, "peak": peak, "free": free}
    assert (found["fits"], found["changes"]) == (True, [])
    # 2 times 1,000 texts, 8 x 2 x 2 of them in a step.
    assert found["steps"] == 63
    assert found["hours"] == pytest.approx(63 * found["seconds_per_step"] / 3600)
    assert found["tokens_per_second"] == pytest.approx(
        2 * 8 * 2 * (256 + 300) / found["seconds_per_step"]
    )
    assert found["target_parameters"] == shape.target.parameters
    assert found["generation_hours"] > 0


def test_twice_the_speed_is_half_the_time(
    settings: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (str(settings), "--target", str(target))
    slow, fast = (
        planned(capsys, *flags, "--device-tflops", number) for number in ("100", "200")
    )
    assert slow["hours"] == pytest.approx(2 * fast["hours"])
    assert slow["generation_hours"] == fast["generation_hours"]


def test_where_there_is_room_nothing_needs_to_be_computed_anew(
    settings: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (str(settings), "--target", str(target))
    found = planned(capsys, *flags)
    fast = planned(capsys, *flags, "--gradient_checkpointing", "false")
    assert found["without_gradient_checkpointing"] == {
        "peak": fast["memory"]["peak"],
        "hours": pytest.approx(fast["hours"]),
    }
    assert fast["without_gradient_checkpointing"] is None
    assert fast["hours"] < found["hours"]
    assert fast["memory"]["peak"] > found["memory"]["peak"]
    between = (fast["memory"]["peak"] + found["memory"]["peak"]) / 2 + RESERVE
    tight = planned(capsys, *flags, "--device-memory", str(between / GIB))
    assert tight["fits"]
    assert tight["without_gradient_checkpointing"] is None
    slow = planned(
        capsys,
        *(*flags, "--device-memory", str(between / GIB)),
        *("--gradient_checkpointing", "false"),
    )
    assert not slow["fits"]
    assert slow["fits_after_changes"]


def test_the_largest_stage_has_to_fit(
    settings: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (str(settings), "--target", str(target), "--max_steps", "7")
    small, large = (
        planned(capsys, *flags, "--layers", layers) for layers in ("own:3", "own:0,1,3")
    )
    stages = ("--stages", "own:0,1,3", "--stage_steps", "5", "--layers", "own:3")
    found = planned(capsys, *flags, *stages)
    assert found["memory"] == large["memory"] != small["memory"]
    assert found["seconds_per_step"] == small["seconds_per_step"]
    assert found["steps"] == 5 + 7
    assert found["hours"] == pytest.approx(
        small["hours"] + large["hours"] * 5 / 7, rel=1e-6
    )


def test_the_changes_make_it_fit_and_none_is_needless(
    settings: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(settings), "--target", str(target)]
    device = ["--device-memory", "2.22"]
    found = planned(capsys, *flags, *device)
    assert not found["fits"]
    assert found["fits_after_changes"]
    changes = found["changes"]
    assert changes[0]["settings"] == {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
    }
    peaks = [found["memory"]["peak"], *(change["peak"] for change in changes)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] <= found["memory"]["free"] < peaks[-2]
    # With these settings it says so itself.
    wanted = {k: v for change in changes for k, v in change["settings"].items()}
    as_flags = [f"--{name}={value}" for name, value in wanted.items()]
    again = planned(capsys, *flags, *device, *as_flags)
    assert again["fits"]
    assert again["memory"]["peak"] == peaks[-1]


def test_what_nothing_helps_fails(
    settings: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--target", str(target), "--device-memory", "1"]
    assert main(["plan", str(settings), *flags]) == 1
    out = capsys.readouterr().out
    assert "per_device_train_batch_size: 4 (was 8), gradient_accumulation_steps" in out
    assert "It does not fit with all of these either" in out


def test_the_text_shows_all_and_traces(
    settings: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(target / "config.json")  # a file is enough
    flags = ["--per_device_train_batch_size", "1", "--anchors_per_text", "16"]
    assert main(["plan", str(settings), "--target", config, *flags, "--trace"]) == 0
    out = capsys.readouterr().out
    for part in (
        "target   qwen3, 0.00 G parameters",
        "a step   1 texts of 1024 tokens at most, 16 blocks behind each, 64 labels",
        "| target's weights ",
        "| The real step, traced ",
        "A step fits, and with gradient_checkpointing: false too",
        "| training, hours ",
        "| checkpoints (3) ",
    ):
        assert part in out


def test_spans_are_traced_and_take_time(
    settings: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The formula of memory leaves them out, and says so."""
    flags = ["--target", str(target), "--per_device_train_batch_size", "1"]
    flags += ["--anchors_per_text", "256", "--layers", "own:0", "--trace"]
    on_policy = ["--on_policy_weight", "0.5"]
    plain, found = (planned(capsys, *flags, *more) for more in ([], on_policy))
    assert found["traced"]["peak"] > plain["traced"]["peak"]
    assert found["hours"] > plain["hours"]
    assert found["memory"] == plain["memory"]
    assert main(["plan", str(settings), *flags, *on_policy]) == 0
    assert "leaves on_policy_weight out; the traced step" in capsys.readouterr().out


def test_data_says_what_there_is(
    tiny_llama: Path, tiny_answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--target", str(tiny_llama), "--data", str(tiny_answers))
    found = planned(capsys, *flags, "--layers", "own:0", "--num_train_epochs", "3")
    assert found["steps"] == -(-17 * 3 // 4)  # 17 of 24 are not held out
    assert found["generation_hours"] == 0


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            ["--device-memory", "0"],
            "--device-memory: got 0.0, expected a number above 0",
        ),
        (["--utilisation", "2"], "utilisation: got 2.0, expected a part"),
        (["--layers", "own:9"], "the target has layers 0 to 3"),
        (["--target", "/nowhere/x"], "--target '/nowhere/x': expected a Hugging Face"),
        (["--target", ""], "target: got nothing"),
        (
            ["--target_device_map", "auto"],
            "--target-device-map: got 'auto', but a plan",
        ),
        (["--on_policy_weight", "1"], "leaves out; add --trace, which runs the step"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: list[str], reason: str, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--target", str(target), *flags]) == 1
    err = capsys.readouterr().err
    assert reason in err
    assert err.startswith("vllm-mtp plan: ")
    assert len(err.strip().splitlines()) == 1


UNCOUNTED = {
    "mlp": (["--layers", "own:0,mlp:1"], "layers.1.kind"),
    "per_position": (
        ["--layers", "own:0", "--per-position", "true"],
        "layers.0.per_position",
    ),
    "attention": (
        ["--layers", "own:0", "--own-attention", "block"],
        "layers.0.attention",
    ),
    "boundary_of": (
        ["--boundary-hidden", "first", "--boundary-of", "bound"],
        "layers.0.boundary_of",
    ),
    "boundary_layers": (
        ["--boundary-hidden", "first", "--boundary-layers", "2", "0"],
        "boundary_layers",
    ),
    "full_rank": (
        ["--layers", "shared:0", "--full-rank-modules", "q_proj"],
        "layers.0.full_rank",
    ),
    "input": (["--input", "boundary"], "input"),
    "lm_head": (["--lm-head", "own"], "lm_head"),
    "extra_rows": (["--extra-rows", "2"], "extra_rows"),
    "chain": (["--chain", "true", "--markov-rank", "0"], "chain"),
}


@pytest.mark.parametrize("kind", UNCOUNTED)
def test_what_has_no_formula_is_refused_in_a_line(
    kind: str, settings: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, key = UNCOUNTED[kind]
    assert main(["plan", str(settings), "--target", str(target), *flags]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"plan: there is no formula for {key} " in line
    assert "use --trace" in line


def test_a_bidirectional_block_takes_what_a_causal_one_takes(
    settings: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(settings), "--target", str(target)]
    causal = planned(capsys, *flags)
    assert planned(capsys, *flags, "--block-mask", "bidirectional") == causal


def test_what_has_no_formula_is_traced(
    settings: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(settings), "--target", str(target), *UNCOUNTED["mlp"][0], "--trace"]
    assert main(["plan", *flags, "--device-memory", "24"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("| The real step, traced")
    assert "A step fits: 22.0 GiB are free." in text
    found = planned(capsys, *flags, "--device-memory", "2.01", code=1)
    assert found["fits"] is False
    parts = [size for name, size in found["traced"].items() if name != "peak"]
    assert found["traced"]["peak"] == sum(parts) > 0.01 * GIB
