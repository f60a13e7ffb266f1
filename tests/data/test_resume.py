# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp generate`` with vLLM: killed and continued, it gives the same answers."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM

from tests.data.conftest import WriteJsonl, generate_command
from vllm_mtp.cli.main import main
from vllm_mtp.data.store import GENERATION_FILE, SPLITS, read_provenance, read_split

pytest.importorskip("vllm")
pytest.importorskip("datasets")
pytestmark = pytest.mark.engine

# As `serving.engines` sets it; the command leaves alone what is set.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

# Many parts, so that a fast machine cannot finish before it is stopped.
PARTS, PART_PROMPTS, MAX_TOKENS = 60, 4, 32
START_SECONDS = 300


@pytest.fixture
def prompts(write_jsonl: WriteJsonl) -> Path:
    """Prompts of very different lengths."""
    count = PARTS * PART_PROMPTS
    return write_jsonl([{"prompt": f"{n}: " + "word " * (n % 9)} for n in range(count)])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A tiny target is quicker so, above all where other programs run; and nothing of
    an engine is left to the next test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    gc.collect()


def arguments(target: Path, prompts: Path, out: Path, temperature: float) -> list[str]:
    return generate_command(
        target=target,
        prompts=prompts,
        out=out,
        temperature=temperature,
        seed=5,
        dtype="float32",
        max_prompt_tokens=96,
        max_tokens=MAX_TOKENS,
        max_num_seqs=PART_PROMPTS,
        held_out=0.3,
    )


def stop_in_the_middle(
    command: Sequence[str], out: Path, number: signal.Signals
) -> tuple[int, str]:
    """Run the command in a process of its own until two more parts are there.

    Returns:
        The exit code, and what was printed.
    """
    wanted = len(parts(out)) + 2
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm_mtp.cli.main", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A shell's background job ignores it, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while len(parts(out)) < wanted and process.poll() is None:
            assert time.monotonic() < deadline, "no parts in time"
            time.sleep(0.005)
        process.send_signal(number)
        text, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode is not None
    return process.returncode, text


def parts(out: Path) -> list[Path]:
    return sorted(out.glob("parts/*.jsonl"))


def rows(out: Path) -> dict[str, list[dict[str, Any]]]:
    return {split: [dict(row) for row in read_split(out, split)] for split in SPLITS}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("temperature", "stops"),
    [(0.0, [signal.SIGKILL]), (1.0, [signal.SIGINT, signal.SIGKILL])],
)
def test_a_run_that_was_stopped_ends_with_the_same_rows(
    temperature: float,
    stops: list[signal.Signals],
    chat_target: Path,
    prompts: Path,
    tmp_path: Path,
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    assert main(arguments(chat_target, prompts, whole, temperature)) == 0
    command = arguments(chat_target, prompts, out, temperature)
    for number in stops:
        code, text = stop_in_the_middle(command, out, number)
        assert 2 <= len(parts(out)) < PARTS, text
        assert not (out / GENERATION_FILE).exists()
        if number == signal.SIGINT:
            assert code == 130, text
            assert "the same command goes on with what is in" in text
            assert "Traceback" not in text
        else:
            assert code == -number, text
    kept = len(parts(out))
    assert kept >= 2 * len(stops)
    assert main(command) == 0
    found = rows(out)
    assert found == rows(whole)
    assert read_provenance(out) == read_provenance(whole)
    lengths = [len(row["loss_spans"]) for split in found.values() for row in split]
    assert len(lengths) > PARTS * PART_PROMPTS / 2
    if temperature == 0:
        check_greedy(chat_target, found["held_out"])
    else:
        assert {row["finish_reason"] for row in found["train"]} == {"stop", "length"}


@torch.no_grad()
def check_greedy(target: Path, held_out: list[dict[str, Any]]) -> None:
    """The answers, and nothing else, are what the target says."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    for row in held_out[:6]:
        ids = torch.tensor([row["input_ids"]])
        ((start, end),) = row["loss_spans"]
        assert end == ids.shape[1]
        said = model(ids).logits[0].argmax(-1)
        assert said[start - 1 : end - 1].tolist() == row["input_ids"][start:end]
        if row["finish_reason"] == "length":
            assert end - start == MAX_TOKENS
        else:
            assert row["input_ids"][-1] in model.generation_config.eos_token_id
