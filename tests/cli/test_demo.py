# SPDX-License-Identifier: Apache-2.0
"""What the demo prints, from measurements that were made up, and one small run."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.servers import user_environment
from tests.tiny_targets import make_tiny_llama
from tests.tiny_tokenizer import save_tiny_tokenizer
from vllm_mtp import new_drafter, save_drafter
from vllm_mtp.cli.demo import Demo, report
from vllm_mtp.data.split import is_held_out, prompt_id
from vllm_mtp.errors import MTPError
from vllm_mtp.evaluation.attribution import Answer, Token
from vllm_mtp.evaluation.demo import DemoPlan, DemoResult, Speed, Texts
from vllm_mtp.evaluation.equality import Comparison
from vllm_mtp.evaluation.kv_cache import KVCache
from vllm_mtp.metrics import AcceptanceCounts

README = Path(__file__).parents[2] / "README.md"
PLAN = DemoPlan(
    target="/cache/t",
    speculative_config={},
    drafter="cheap, found by target",
    num_drafts=4,
    question="Why?",
    prompts=["?"] * 8,
    choice="of ShareGPT, not trained on (`cheap`: untrained)",
    max_tokens=48,
    rounds=2,
    at_once=4,
    dtype="bfloat16",
)
COUNTS = AcceptanceCounts(600, 4 * 600, (300, 150, 100, 50))


def texts(dtype: str, *verdicts: str) -> Texts:
    return Texts(dtype, [Comparison(v) for v in verdicts])  # type: ignore[arg-type]


EXACT = texts("float32", "equal", "equal")
ROUNDED = texts("bfloat16", *["equal"] * 7, "tie")


def made_up(
    exact: Texts = EXACT,
    fast: Texts = ROUNDED,
    drafter_kv: int = 0,
    counts: AcceptanceCounts = COUNTS,
) -> DemoResult:
    speed = Speed(1, [30.0, 40.0, 50.0], [45.0, 44.0, 60.0], 1200, COUNTS)
    return DemoResult(
        exact=exact,
        fast=fast,
        answer=Answer("Why?", ((Token("So", 0),),)),
        speeds=[speed, replace(speed, at_once=4)],
        plain_cache=KVCache(30, 23040.0),
        drafted_cache=KVCache(30, 23040.0 + drafter_kv),
        counts=counts,
    )


def lines(result: DemoResult) -> dict[str, str]:
    """The table's rows by name."""
    rows = re.findall(r"^  (\S.*?)  +(\S.*)$", report(PLAN, result), re.MULTILINE)
    return dict(rows)


THE_TARGETS = "answers are the target's, token by token"


def test_the_report_says_what_is_the_targets() -> None:
    table = lines(made_up())
    assert table["texts in float32"] == f"2 of 2 {THE_TARGETS}"
    assert table["texts in bfloat16"] == (
        "8 of 8 answers are the target's, 1 of them up to a tie"
    )
    assert "A tie: " in report(PLAN, made_up())


def test_where_nothing_ties_no_tie_is_told_of() -> None:
    without = made_up(fast=texts("bfloat16", *["equal"] * 8))
    assert lines(without)["texts in bfloat16"] == f"8 of 8 {THE_TARGETS}"
    assert "A tie: " not in report(PLAN, without)


def test_what_is_all_in_float32_is_one_row() -> None:
    table = lines(made_up(fast=texts("float32", *["equal"] * 8)))
    assert [name for name in table if "texts" in name] == ["texts in float32"]
    assert table["texts in float32"] == f"10 of 10 {THE_TARGETS}"


@pytest.mark.parametrize(
    ("result", "row", "shown"),
    [
        (made_up(texts("float32", "equal", "different")), "texts in float32", "1 of 2"),
        (
            made_up(fast=texts("bfloat16", *["equal"] * 6, "tie", "different")),
            "texts in bfloat16",
            "7 of 8",
        ),
    ],
    ids=["float32", "bfloat16"],
)
def test_a_difference_is_shown_and_fails(
    result: DemoResult, row: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lines(result)[row].startswith(f"{shown} answers are the target's")
    assert Demo()._exit_code(result) == 1
    assert "FAILED: texts differ from the target's" in capsys.readouterr().out


def test_too_few_accepted_drafts_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert Demo()._exit_code(made_up()) == 0
    assert capsys.readouterr().out == ""
    none = made_up(counts=AcceptanceCounts(0, 0, ()))
    assert Demo()._exit_code(none) == 1
    assert "FAILED: acceptance length not above 1.2" in capsys.readouterr().out
    assert Demo(min_acceptance_length=0)._exit_code(none) == 0


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    table = lines(made_up())
    assert table["speed, one request"] == (
        "1.20 times the target alone (1.10 to 1.50): 45.0 tokens/s, alone 40.0"
    )
    assert table["speed, 4 at once"].startswith("1.20 times")
    assert table["tokens per step"].startswith("2.00 with one request, 2.00 with 4")


@pytest.mark.parametrize("drafter_kv", [0, 768])
def test_the_drafters_cache_is_a_difference(drafter_kv: int) -> None:
    found = lines(made_up(drafter_kv=drafter_kv))["drafter's KV cache"]
    assert found == (
        f"{drafter_kv} bytes per token (23,040 without it, {23040 + drafter_kv:,} "
        "with it)"
    )


def test_the_readme_shows_the_demos_rows() -> None:
    """The figures are one run's; the rows and their words are the demo's."""
    block = README.read_text("utf-8").partition("and prints:\n\n")[2]
    shown = block.partition("\n\n")[0].splitlines()

    def words(line: str) -> str:
        return re.sub(r"\d[\d.,]*", "#", " ".join(line.split()))

    expected = [words(line) for line in report(PLAN, made_up()).splitlines()]
    kept = [line for line in expected if not line.startswith(("target ", "prompts "))]
    assert len(shown) == 8
    assert [words(line) for line in shown] == kept[:8]


def test_its_prompts_are_none_that_the_drafter_was_trained_on() -> None:
    plan = Demo(num_prompts=20)._plan()
    assert plan.drafter == "cheap, found by target"
    assert plan.num_drafts == 4
    assert "held out by hash" in plan.choice
    for text in plan.prompts:
        assert is_held_out(prompt_id([{"role": "user", "content": text}]), 0.04)
    assert len(set(plan.prompts)) == 20
    assert plan.speculative_config == {"method": "mtp_placeholder"}


@pytest.mark.parametrize("number", [0, 10**6])
def test_a_number_of_prompts_that_there_are_not(number: int) -> None:
    with pytest.raises(MTPError, match=r"--num-prompts: got \d+, expected 1 to \d+"):
        Demo(num_prompts=number)._plan()


def test_a_page_without_a_folder_is_refused_first(tmp_path: Path) -> None:
    demo = Demo(target="/nonexistent", html=str(tmp_path / "none" / "page.html"))
    with pytest.raises(MTPError, match=r"^--html .* no such folder"):
        demo.run()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny target and itself as its drafter."""
    folder = tmp_path_factory.mktemp("demo")
    target = make_tiny_llama(folder / "target", max_position_embeddings=2048)
    save_tiny_tokenizer(target)
    path = target / "tokenizer_config.json"
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    settings = json.loads(path.read_text("utf-8")) | {"chat_template": template}
    path.write_text(json.dumps(settings), "utf-8")
    save_drafter(new_drafter(target, "shared:all", 3), folder / "drafter")
    return folder


def started(tiny: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command, as a user starts it; all that it starts is in its group."""
    command = [sys.executable, "-m", "vllm_mtp.cli.main", "demo", *arguments]
    command += ["--target", str(tiny / "target"), "--drafter", str(tiny / "drafter")]
    return subprocess.Popen(
        command,
        env=user_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background job ignores it, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


SMALL = ("--num-prompts=3", "--max-tokens=12", "--rounds=2", "--concurrency=2")


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_small_run(tiny: Path, tmp_path: Path, dtype: str) -> None:
    page = tmp_path / "page.html"
    process = started(tiny, *SMALL, "--dtype", dtype, "--html", str(page))
    out, err = process.communicate(timeout=500)
    print(out, err)
    table = dict(re.findall(r"^  (\S.*?)  +(\S.*)$", out, re.MULTILINE))
    # The question and a prompt, and in float32 the three prompts again.
    number = 5 if dtype == "float32" else 2
    assert table["texts in float32"] == f"{number} of {number} {THE_TARGETS}"
    assert f"texts in {dtype}" in table
    assert table["drafter's KV cache"].startswith("0 bytes per token")
    assert re.match(r"\d.* times the target alone", table["speed, 2 at once"])
    # The target's own first draft is what it says next.
    assert re.search(r"draft at position 1: [1-9]", out)
    assert f"written: {page}" in out
    assert 'class="draft p1"' in page.read_text("utf-8")
    # Nobody's log lines between those for the reader.
    assert out.startswith("\n  target ")
    assert not re.search(r"warn|error|INFO", out + err, re.IGNORECASE)
    if dtype == "float32":  # elsewhere a tiny model's ties decide
        assert process.returncode == 0


@pytest.mark.engine
def test_an_interrupt_while_an_engine_starts_leaves_nothing(tiny: Path) -> None:
    process = started(tiny, *SMALL)
    assert process.stderr is not None
    seen = ""
    while "starting" not in seen:
        seen += process.stderr.read(1)
    time.sleep(5)  # its process is there, and loads the target
    os.killpg(process.pid, signal.SIGINT)
    # Not `communicate`, which would miss what is read already.
    assert process.stderr.read().rstrip().endswith("vllm-mtp demo: interrupted")
    assert process.wait(timeout=60) == 130
    deadline = time.monotonic() + 10
    while left := running_of_group(process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def running_of_group(group: int) -> list[str]:
    """What /proc says of a group's processes, but for those that nobody waited for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            stat = path.read_text()
            state, _, its_group = stat.rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(stat)
    return found
