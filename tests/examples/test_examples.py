# SPDX-License-Identifier: Apache-2.0
"""Every example, run as a user runs it."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import Server, user_environment

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, f"examples/{name}", *arguments],
        cwd=REPOSITORY,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    print(done.stdout)
    print(done.stderr[-4000:], file=sys.stderr)
    return done


def test_one_step() -> None:
    done = run("one_step.py")
    assert done.returncode == 0
    shown = dict(re.findall(r"^(\S.*?) {2,}(.*)$", done.stdout, re.MULTILINE))
    for row in ("scratch slots", "overwritten"):
        assert shown[row] == "[22, 23, 36, 37]"  # of the blocks 5 and 9
    assert shown["block"] == "[4, 32] [k, hidden]"
    assert shown["verified"] == "[5, 32] [k + 1, hidden]"
    drafts, target = (json.loads(shown[row]) for row in ("drafts", "target says"))
    accepted, bonus = re.findall(r"\d+", shown["accepted"])[::2]
    number = int(accepted)
    # Some, or nothing is shown; not all, or no rejection is.
    assert 1 < number < len(drafts) == 4
    assert drafts[:number] == target[:number]
    assert drafts[number] != target[number] == int(bonus)
    step = json.loads(shown["this step"])
    assert step == [*drafts[:number], int(bonus)] == json.loads(shown["one by one"])


def test_one_step_needs_torch_alone() -> None:
    source = ast.parse((REPOSITORY / "examples" / "one_step.py").read_text("utf-8"))
    imports = [
        n for n in ast.walk(source) if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    assert [ast.unparse(node) for node in imports] == ["import torch"]


@pytest.mark.engine
def test_make_a_drafter(tmp_path: Path) -> None:
    done = run("make_a_drafter.py", "--out", str(tmp_path / "mine"))
    assert done.returncode == 0
    assert "shared:all: 5 of 20 accepted" in done.stdout
    assert "drafts after saving and loading: the same" in done.stdout

    from vllm_mtp import load_drafter

    layers = load_drafter(tmp_path / "mine").config.layers
    assert [layer.kind for layer in layers] == ["shared"] * 10 + ["own"] * 2
    assert [layer.target_layer for layer in layers] == [*range(10), 28, 20]


@pytest.mark.engine
def test_offline_generation() -> None:
    # However few drafts a busy machine has time for.
    done = run("offline_generation.py", "--min-acceptance-length", "1")
    assert done.returncode == 0
    # Not which: in bfloat16 that depends on the machine's kernels.
    assert len(re.findall(r"^A: \S", done.stdout, re.MULTILINE)) == 3
    length = re.search(r"acceptance length (\d\.\d+)", done.stdout)
    assert length is not None
    assert float(length[1]) > 1


@pytest.mark.engine
def test_openai_client(server: Server) -> None:
    done = run("openai_client.py", "--base-url", f"{server.url}/v1")
    assert done.returncode == 0
    position = re.search(r"position 1: (\d\.\d+) accepted", done.stdout)
    assert position is not None
    assert float(position[1]) > 0.1


def test_openai_client_without_a_server_fails() -> None:
    assert run("openai_client.py", "--base-url", "http://127.0.0.1:9/v1").returncode


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_say_what_they_show(example: Path) -> None:
    text = ast.get_docstring(ast.parse(example.read_text("utf-8"))) or ""
    assert all(word in text for word in ("Shows:", "Run:", "Expect:"))
    assert example.name in (REPOSITORY / "examples" / "README.md").read_text("utf-8")
