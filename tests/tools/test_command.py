# SPDX-License-Identifier: Apache-2.0
"""Wrong numbers are one line, before the work."""

import sys
from importlib import import_module

import pytest

from tools.command import finish
from vllm_mtp.errors import MTPError

# Each tool's flags for whole numbers above 0, and what else it has to be told.
TOOLS: dict[str, tuple[list[str], list[str]]] = {
    "systems.__main__": (
        ["train"],
        ["max-steps", "prompts", "max-tokens", "best", "speed-prompts", "rounds"],
    ),
    "unverified": (["--drafter", "d"], ["limit", "max-tokens", "batch"]),
    "nothing_drafted": ([], ["turns", "batches"]),
    "windows": ([], ["contexts", "windows", "prompts", "max-tokens", "rounds"]),
    "step_memory": ([], ["tokens", "anchors", "places", "repeats", "texts"]),
}
CASES = [
    (tool, [*others, f"--{flag}", number], flag)
    for tool, (others, flags) in TOOLS.items()
    for flag in flags
    for number in ("0", "-1", "1.5", "many")
] + [
    ("systems.__main__", ["train", "--minutes", number], "minutes")
    for number in ("0", "-1", "nan", "inf", "many")
]


@pytest.mark.parametrize(
    ("tool", "flags", "name"),
    CASES,
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else value,
)
def test_a_wrong_number_is_refused_in_a_line(
    tool: str,
    flags: list[str],
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", [tool, *flags])
    with pytest.raises(SystemExit) as stop:
        import_module(f"tools.{tool}").main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"argument --{name}: got {flags[-1]}, expected " in line


def test_errors_and_ctrl_c_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> int:
        raise MTPError("--out: got nothing")

    def interrupted() -> int:
        raise KeyboardInterrupt

    assert finish("a tool", lambda: 3, "it goes on") == 3
    assert finish("a tool", wrong, "it goes on") == 1
    assert finish("a tool", interrupted, "it goes on") == 130
    assert capsys.readouterr().err.split("\n") == [
        *("a tool: --out: got nothing", ""),
        *("a tool: interrupted; it goes on", ""),
    ]
