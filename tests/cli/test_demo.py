# SPDX-License-Identifier: Apache-2.0
"""What the demo prints, from measurements that were made up."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_mtp.cli.demo import Demo, report
from vllm_mtp.data.split import is_held_out, prompt_id
from vllm_mtp.evaluation.demo import DemoPlan, DemoResult, Side
from vllm_mtp.evaluation.equality import Comparison
from vllm_mtp.evaluation.kv_cache import KVCache
from vllm_mtp.metrics import AcceptanceCounts

README = Path(__file__).parents[2] / "README.md"
PLAN = DemoPlan(
    target="t",
    speculative_config={},
    drafter="cheap, found by target",
    prompts=["?"] * 12,
    choice="of ShareGPT, not trained on (`cheap`: untrained)",
    max_tokens=64,
    rounds=2,
    concurrency=4,
)
COUNTS = AcceptanceCounts(618, 4 * 618, (400, 200, 100, 50))
VERDICTS = ["equal"] * 2 + ["tie"] * 10


def made_up(verdicts: list[str], drafter_kv: int = 0) -> DemoResult:
    return DemoResult(
        Side(KVCache(30, 23040.0), 364, 128, [74.4, 77.9]),
        Side(KVCache(30, 23040.0 + drafter_kv), 364, 128, [95.4, 95.9], counts=COUNTS),
        [Comparison(verdict) for verdict in verdicts],  # type: ignore[arg-type]
    )


def lines(result: DemoResult) -> dict[str, str]:
    """The table's rows by name."""
    rows = re.findall(r"^  (\S.*?)  +(\S.*)$", report(PLAN, result), re.MULTILINE)
    return dict(rows)


def test_a_float_tie_is_the_targets_text_and_counted() -> None:
    table = lines(made_up(VERDICTS))
    assert table["the target's text"] == (
        "12 of 12 answers: 2 to the end, 10 up to a float tie; 0 differ"
    )
    assert "A float tie: " in report(PLAN, made_up(VERDICTS))
    assert "A float tie: " not in report(PLAN, made_up(["equal"] * 12))


def test_what_differs_is_not_hidden() -> None:
    table = lines(made_up([*VERDICTS[:-1], "different"]))
    assert table["the target's text"].startswith("11 of 12 answers: 2 to the end, 9 up")
    assert table["the target's text"].endswith("1 differ")


@pytest.mark.parametrize("drafter_kv", [0, 768])
def test_the_drafters_cache_is_a_difference(drafter_kv: int) -> None:
    found = lines(made_up(VERDICTS, drafter_kv))["drafter's KV cache"]
    assert found == (
        f"{drafter_kv} bytes per token: 23,040 in 30 layers without, "
        f"{23040 + drafter_kv:,} in 30 layers with"
    )


def test_the_readme_shows_the_demos_rows() -> None:
    """The figures are one run's; the rows and their words are the demo's."""
    block = README.read_text("utf-8").partition("and prints:\n\n")[2]
    shown = block.partition("\n\n")[0].splitlines()
    printed = report(PLAN, made_up(VERDICTS)).strip("\n").partition("\n\n")[0]

    def words(line: str) -> str:
        return re.sub(r"[\d.,]+", "#", line.strip()).replace("# #", "#")

    expected = [words(line) for line in printed.splitlines()]
    left_out = ("target ", "drafter ", "prompts ")
    kept = [line for line in expected if not line.startswith(left_out)]
    assert [words(line) for line in shown] == kept


def test_its_prompts_are_none_that_the_drafter_was_trained_on() -> None:
    plan = Demo(num_prompts=20)._plan()
    assert plan.drafter == "cheap, found by target"
    assert "held out by hash" in plan.choice
    for text in plan.prompts:
        assert is_held_out(prompt_id([{"role": "user", "content": text}]), 0.04)
    assert len(set(plan.prompts)) == 20
    assert replace(plan, prompts=[]).speculative_config == {"method": "mtp_placeholder"}
