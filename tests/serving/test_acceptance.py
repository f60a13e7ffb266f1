# SPDX-License-Identifier: Apache-2.0
"""`vllm-mtp eval --in-vllm`: simulated decoding counts what vLLM counts."""

from pathlib import Path

import pytest

from vllm_mtp.cli.main import main
from vllm_mtp.drafter.checkpoint import save_drafter
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def drafters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exact drafter, and one that leaves out the target's last layer."""
    folder = tmp_path_factory.mktemp("drafters")
    options = DrafterOptions(dtype="float32")
    for name, layers in (("exact", "shared:all"), ("short", "shared:0-2")):
        save_drafter(new_drafter(tiny_llama, layers, 2, options), folder / name)
    return folder


def evaluate(drafter: Path, target: Path, data: Path, *flags: str) -> int:
    names = ["--target", str(target), "--data", str(data), "--dtype", "float32"]
    return main(["eval", str(drafter), *names, "--in-vllm", *flags])


def test_vllm_counts_what_was_simulated(
    drafters: Path,
    tiny_llama: Path,
    tiny_answers: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = str(drafters / "short")
    assert (
        evaluate(drafters / "exact", tiny_llama, tiny_answers, "--baseline", short) == 0
    )
    text = capsys.readouterr().out
    assert "largest difference of a position over all: 0.00 points" in text
    assert "| **all** | 1.000 / 1.000 |" in text
    assert f"baseline {short} in vLLM: acceptance length 1." in text


def test_a_worse_drafter_fails(
    drafters: Path,
    tiny_llama: Path,
    tiny_answers: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--min-acceptance-length", "1.99")
    assert evaluate(drafters / "short", tiny_llama, tiny_answers, *flags) == 1
    assert "FAILED: acceptance length" in capsys.readouterr().out
