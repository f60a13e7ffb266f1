# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp check``: passes what is right, and finds what is wrong, by vLLM too."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.evaluation.drafter_faults import FAULTS, Fault
from tests.serving.conftest import PLAIN
from tests.serving.engines import ON_V2
from vllm_mtp.cli.main import main
from vllm_mtp.drafter.checkpoint import save_drafter
from vllm_mtp.drafter.layout import table_without
from vllm_mtp.evaluation.probe import PROBE_FILE
from vllm_mtp.torch_host.new_drafter import new_drafter

pytestmark = pytest.mark.engine

Check = Callable[..., tuple[int, str]]


@pytest.fixture
def check(capfd: pytest.CaptureFixture[str]) -> Check:
    """Runs the command; gives its exit code and what it printed."""

    def run(drafter: Path, target: Path, *flags: str) -> tuple[int, str]:
        capfd.readouterr()
        code = main(["check", str(drafter), "--target", str(target), *flags])
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.mark.parametrize(
    "name", ["shared-4", "own-some", "mixed-windowed", "chain-all", "heads"]
)
def test_a_good_drafter_passes(
    name: str,
    check: Check,
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    target = tiny_targets["llama" if name == "own-some" else "qwen3"]
    if ON_V2:
        target = tiny_targets["llama"]
    folder = shutil.copytree(tiny_drafter(target.name, name), tmp_path / "drafter")
    code, out = check(folder, target, "--record")
    assert code == 0, out
    assert (folder / PROBE_FILE).is_file()
    code, out = check(folder, target, "--all-layers")
    assert code == 0, out
    assert "PASSED: files, facts, target, torch, vLLM agree" in out
    for stage in ("input", "layer 1", "final norm", "drafted tokens"):
        assert f"vLLM    {stage}" in out
    assert "NOT checked" not in out


def test_a_window_that_vllm_reads_wrong_is_found(
    check: Check, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(PLAIN, prefix_window=50)
    drafter = new_drafter(tiny_llama, "own:1,2", 4, options)
    folder = save_drafter(drafter, tmp_path / "drafter")
    monkeypatch.setattr(
        "vllm_mtp.drafter.layout.table_without",
        lambda table, size, skipped, most: table_without(
            table, size, 0 * skipped, most
        ),
    )
    code, out = check(folder, tiny_llama)
    assert code == 1
    assert "they part at vLLM, layer 0" in out


@pytest.mark.parametrize("flags", [[], ["--skip-checksums"]], ids=["all", "computed"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_located(
    name: str, flags: list[str], check: Check, tiny_llama: Path, tmp_path: Path
) -> None:
    """By every level, so by vLLM alone too."""
    if not flags and name != "binding off by one":
        pytest.skip("every engine costs time; test_probe.py has the files' level")
    fault: Fault = FAULTS[name]
    target = shutil.copytree(tiny_llama, tmp_path / "target")
    drafter = new_drafter(target, "shared:0,own:1,2", 4, PLAIN)
    folder = save_drafter(drafter, tmp_path / "drafter")
    assert check(folder, target, "--record")[0] == 0
    fault.make(folder, target)
    code, out = check(folder, target, *flags)
    assert code == 1
    expected = {**fault.found, "vLLM": fault.found["torch"]}
    if flags:
        del expected["files"]
    failed = [" ".join(line.split()) for line in out.splitlines() if "FAIL" in line]
    for level, where in expected.items():
        assert any(line.startswith(f"{level} {where} ") for line in failed), out
    level, where = next(iter(expected.items()))
    assert f"FAILED: they part at {level}, {where}" in out


def test_without_a_probe_it_says_what_was_not_checked(
    check: Check,
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
) -> None:
    code, out = check(tiny_drafter("llama", "own-1"), tiny_targets["llama"])
    assert code == 0, out
    assert "PASSED: facts, vLLM agree" in out
    assert "NOT checked: whether the folder is" in out


def test_another_target_is_refused_without_an_engine(
    check: Check,
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
) -> None:
    drafter = tiny_drafter("llama", "own-1")
    code, out = check(drafter, tiny_targets["qwen3"])
    assert code == 1
    assert "FAILED: they part at facts, config key target.model_type" in out
    code, out = check(drafter, tiny_targets["qwen3"], "--record")
    assert code == 1
    assert not (drafter / PROBE_FILE).exists()


def test_the_shipped_drafter_passes(check: Check, smollm2: Path) -> None:
    from vllm_mtp.installed import installed_folder

    for name in ("cheap", "shared"):
        code, out = check(installed_folder(name), smollm2)
        assert code == 0, out
        print(out)
