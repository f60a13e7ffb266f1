# SPDX-License-Identifier: Apache-2.0
"""Every row of the ablation is a run that can be started."""

import json
from typing import Any

import pytest

from tools.ablation import (
    BASE,
    REPORT,
    RESULTS,
    ROOT,
    all_rows,
    key_of,
    questions,
    renewed,
    table_of,
)
from tools.systems.train import flags_of
from vllm_mtp.cli.main import _load
from vllm_mtp.drafter.layer_spec import parse_layers


@pytest.mark.parametrize("row", all_rows(), ids=lambda row: row["name"])
def test_rows_are_valid(row: dict[str, Any]) -> None:
    flags = ["--target", "t", "--data", "d", *flags_of(row["set"])]
    args = _load("train", [str(ROOT / BASE), *flags])
    layers = parse_layers(args.layers, 30)
    assert args.plan().feature_weight == 0 or any(x.kind == "own" for x in layers)
    for name, value in row["set"].items():
        assert (getattr(args, name) or None) == (value or None), name


def test_every_row_has_its_result_and_the_page_shows_it() -> None:
    """A key that is renamed in the settings would lose the runs before."""
    results = json.loads(RESULTS.read_text("utf-8"))
    assert {key_of(row["set"]) for row in all_rows()} == set(results)
    page = REPORT.read_text("utf-8")
    assert renewed(page, results) == page, "python tools/ablation.py --report-only"


def test_teacher_forced_measures_are_not_named_like_those_of_decoding() -> None:
    results = json.loads(RESULTS.read_text("utf-8"))
    names = {name for result in results.values() for name in result}
    assert "eval_teacher_forced_length" in names
    assert not any("acceptance" in name for name in names)


def test_the_same_settings_are_one_run() -> None:
    assert key_of({}) == key_of({"num_speculative_tokens": 4})
    assert key_of({}) != key_of({"num_speculative_tokens": 5})


def test_every_row_has_its_result() -> None:
    """A setting that gets another name must not orphan what was measured."""
    results = json.loads(RESULTS.read_text("utf-8"))
    assert {key_of(row["set"]) for row in all_rows()} == set(results)
    for question in questions():
        assert len(table_of(question, results).splitlines()) == 4 + len(
            question["rows"]
        )
