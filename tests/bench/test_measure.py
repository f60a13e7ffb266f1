# SPDX-License-Identifier: Apache-2.0
"""Who is asked what and when, and what is left after a failure; servers are fakes."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from vllm_mtp.bench import measure as measuring
from vllm_mtp.bench import run as running
from vllm_mtp.bench.client import LoadResult
from vllm_mtp.bench.measure import measure
from vllm_mtp.bench.plan import (
    Load,
    Plan,
    auto_side,
    control_side,
    drafter_sides,
    plain_side,
)
from vllm_mtp.bench.report import Report
from vllm_mtp.bench.run import Drafters, num_steps, reports
from vllm_mtp.bench.step_profile import StepProfile
from vllm_mtp.errors import MTPError
from vllm_mtp.installed import installed_folder
from vllm_mtp.metrics import AcceptanceCounts

CHEAP = str(installed_folder("cheap"))
SIDES = (
    plain_side(),
    *drafter_sides("cheap", CHEAP, [2, 4], per_request=True),
    auto_side("cheap", CHEAP),
    control_side(),
)
LOADS = (Load("1 at once", ("a", "b"), 1, 8), Load("2 at once", ("a",) * 4, 2, 8))
PLAN = Plan("/targets/tiny", "float32", 256, 2, SIDES, LOADS)


@dataclass
class FakeServer:
    """Drafts as many tokens as it is asked for, and half of them are right."""

    url: str
    config: dict[str, Any] | None
    ignores_requests: bool = False
    counts: AcceptanceCounts = field(default=AcceptanceCounts(0, 0, ()))

    def reset_prefix_cache(self) -> None:
        pass

    def num_kv_blocks(self) -> int:
        return 9

    def acceptance(self) -> AcceptanceCounts:
        return self.counts

    def metric(self, name: str) -> float:
        return 0.0

    def answer(self, extra_body: dict[str, Any] | None) -> None:
        if self.config is None:
            return
        k = self.config.get("num_speculative_tokens", 3)
        if extra_body and not self.ignores_requests:
            k = extra_body["vllm_xargs"]["num_speculative_tokens"]
        self.counts += AcceptanceCounts(10, 10 * k, (5,) * k)


class Servers:
    """All that were started, and what they were asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[FakeServer] = []
        self.alive: list[str] = []
        self.most_alive = 0
        self.asked: list[tuple[str, int, Any]] = []  # server, prompts, extra body
        self.fail_at: int | None = None
        self.ignore_requests = False
        for name in ("launch_server", "wait_for_health", "kill_server", "run_load"):
            monkeypatch.setattr(measuring, name, getattr(self, name))

    def launch_server(
        self, target: Path, logs: Path, arguments: Sequence[str], environment: object
    ) -> FakeServer:
        flag = "--speculative-config"
        text = arguments[arguments.index(flag) + 1] if flag in arguments else "null"
        url = f"server {len(self.started)}"
        server = FakeServer(url, json.loads(text), self.ignore_requests)
        self.started.append(server)
        self.alive.append(url)
        self.most_alive = max(self.most_alive, len(self.alive))
        return server

    def wait_for_health(self, server: FakeServer) -> None:
        assert server.url in self.alive

    def kill_server(self, server: FakeServer) -> None:
        self.alive.remove(server.url)

    def run_load(
        self,
        url: str,
        model: str,
        prompts: Sequence[str],
        concurrency: int,
        output_tokens: int,
        *,
        chat_template: bool,
        extra_body: dict[str, Any] | None,
    ) -> LoadResult:
        assert url in self.alive
        if len(self.asked) == self.fail_at:
            raise MTPError("the load failed")
        self.asked.append((url, len(prompts), extra_body))
        (server,) = (server for server in self.started if server.url == url)
        server.answer(extra_body)
        speed = 10.0 if server.config is None else 15.0
        return LoadResult(speed, 16, 16 / speed, 100.0, 50.0, ("x",) * len(prompts))


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Servers:
    return Servers(monkeypatch)


def nothing(_: str) -> None:
    pass


def test_fixed_numbers_ask_one_server_and_two_without_speculation_are_two(
    servers: Servers, tmp_path: Path
) -> None:
    (found,) = measure(PLAN, tmp_path, nothing)
    most = {"num_speculative_tokens": 4}
    method = {"method": "mtp_placeholder", "model": CHEAP}
    assert [server.config for server in servers.started] == [
        None,
        method | most,
        method,
        None,
    ]
    assert servers.most_alive == 4
    assert servers.alive == []
    assert set(found.kv_blocks) == {side.name for side in SIDES}
    drafted = {}
    for record in found.records:
        drafted[record.side] = record.counts.draft_tokens
    assert drafted == {
        "none": 0,
        "cheap k=2": 20,
        "cheap k=4": 40,
        "cheap auto": 30,
        "none again": 0,
    }
    # The first load's warm-up in the plan's order, then a round, then one turned round.
    order = ["server 0", "server 1", "server 1", "server 2", "server 3"]
    first = [url for url, _, _ in servers.asked[:15]]
    assert first == [*order, *order, *reversed(order)]


def test_every_round_has_servers_of_its_own(servers: Servers, tmp_path: Path) -> None:
    plan = replace(PLAN, fresh_servers=True, sides=(SIDES[0], SIDES[3], SIDES[4]))
    first, second = measure(plan, tmp_path, nothing)
    assert len(servers.started) == 2 * 3
    assert servers.most_alive == 3
    assert (first.rounds, second.rounds) == (1, 2)
    assert [record.round for record in first.records] == [0] * 6
    assert first.records == second.records[:6]
    assert [record.round for record in second.records] == [0] * 6 + [1] * 6


def test_a_server_that_ignores_a_requests_number_is_found_out(
    servers: Servers, tmp_path: Path
) -> None:
    """vLLM drops what it does not know, and k=2 would be another name of k=4."""
    servers.ignore_requests = True
    with pytest.raises(MTPError, match="cheap k=2: the server drafted 40 tokens in 10"):
        list(measure(PLAN, tmp_path, nothing))
    assert servers.alive == []
    assert [prompts for _, prompts, _ in servers.asked] == [1, 1], "while warming up"


@pytest.mark.parametrize("fresh_servers", [False, True])
@pytest.mark.parametrize("calibrate", [None, "cheap"])
def test_progress_comes_as_often_as_was_said(
    fresh_servers: bool, calibrate: str | None, servers: Servers, tmp_path: Path
) -> None:
    plan = replace(PLAN, fresh_servers=fresh_servers)
    drafters = Drafters({"cheap": CHEAP}, calibrate)
    texts: list[str] = []
    *_, last = reports(plan, drafters, "bench", tmp_path, texts.append)
    assert len(texts) == num_steps(plan, drafters)
    assert len(last.stages) == (1 if calibrate is None else 2)


def test_what_is_calibrated_is_measured_beside_a_control(
    servers: Servers, tmp_path: Path
) -> None:
    drafters = Drafters({"cheap": CHEAP}, "cheap")
    *_, last = reports(PLAN, drafters, "bench", tmp_path, nothing)
    assert last.schedules == {"cheap": [(1, 2, 2)]}, "both are as fast, so the first"
    names = [side.name for side in last.stages[1].plan.sides]
    assert names == ["none", "cheap calibrated", "none again"]
    verdicts = {line.side: line.verdict for line in last.stages[1].lines}
    assert verdicts["cheap calibrated"] == "faster"


def test_a_load_that_fails_takes_only_its_round(
    servers: Servers, tmp_path: Path
) -> None:
    """Of three rounds with new servers, the second fails at its last load."""
    plan = replace(PLAN, fresh_servers=True, rounds=3)
    servers.fail_at = 2 * 2 * 2 * len(SIDES) - 1
    found: list[Report] = []
    with pytest.raises(MTPError, match="the load failed"):
        found.extend(reports(plan, Drafters({}), "bench", tmp_path, nothing))
    (report,) = found
    (stage,) = report.stages
    assert stage.plan.rounds == 1
    assert {line.texts for line in stage.lines} == {2, 4}
    assert servers.alive == []


class FailingProfiles:
    """The second side's profile ends in an error."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def __call__(self, plan: Plan, side: Any) -> list[StepProfile]:
        self.asked.append((side.name, side.speculative_config))
        if len(self.asked) == 2:
            raise KeyboardInterrupt
        return [StepProfile(side.name, 1, 5, 10.0, 8.0, {"target: layers": 9.0})]


def test_a_profile_that_fails_takes_nothing_away(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiles = FailingProfiles()
    monkeypatch.setattr(running, "_profiles", profiles)
    plan = replace(PLAN, profiled_steps=5)
    drafters = Drafters({"cheap": CHEAP})
    found: list[Report] = []
    with pytest.raises(KeyboardInterrupt):
        found.extend(reports(plan, drafters, "bench", tmp_path, nothing))
    assert len(found[-1].stages[0].lines) == len(LOADS) * len(SIDES)
    assert [profile.side for profile in found[-1].profiles] == ["none"]
    # What shares a server is profiled with its own number of tokens.
    assert profiles.asked[1][0] == "cheap k=4"
    assert profiles.asked[1][1]["num_speculative_tokens"] == 4


@pytest.mark.parametrize(
    ("lengths", "schedules", "expected"),
    [
        ([1, 2], {}, "cheap k=2"),
        ([1, 2], {"cheap": [(1, 1, 1), (2, 8, 2)]}, "cheap k=1"),
        ([1, 2], {"cheap": [(1, 8, 0)]}, "cheap k=2"),
        ([], {}, "cheap k=4"),  # all that it was made for
    ],
)
def test_what_is_profiled_has_a_fixed_number(
    lengths: list[int], schedules: dict[str, Any], expected: str
) -> None:
    fixed = drafter_sides("cheap", CHEAP, lengths, per_request=True)
    plan = replace(PLAN, sides=(plain_side(), *fixed, auto_side("cheap", CHEAP)))
    drafters = Drafters({"cheap": CHEAP})
    plain, ours = running._profiled_sides(plan, drafters, schedules)
    assert (plain.name, ours.name) == ("none", expected)


def test_the_servers_environment_is_this_ones_and_the_plans(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []
    launch = servers.launch_server

    def launch_server(target: Path, logs: Path, arguments: Any, given: Any) -> Any:
        seen.append(given)
        return launch(target, logs, arguments, given)

    monkeypatch.setattr(measuring, "launch_server", launch_server)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    list(measure(replace(PLAN, environment={"A": "1"}), tmp_path, nothing))
    for environment in seen:
        assert environment["A"] == "1"
        assert environment["VLLM_USE_V2_MODEL_RUNNER"] == "1"
        assert environment["PATH"] == os.environ["PATH"]
