# SPDX-License-Identifier: Apache-2.0
"""Measure: all sides' servers at once, each load by one side after the other."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_mtp.bench.client import LoadResult, run_load
from vllm_mtp.bench.plan import Load, Plan, Side
from vllm_mtp.bench.servers import (
    Server,
    kill_server,
    launch_server,
    wait_for_health,
)
from vllm_mtp.errors import MTPError
from vllm_mtp.metrics import AcceptanceCounts

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Record:
    """One side under one load, once.

    Attributes:
        side: Its name.
        load: Its name.
        round: From 0.
        result: Times and answers.
        counts: Acceptance; no drafts without speculation.
        prefix_hits: Prompt tokens found in the prefix cache.
        preemptions: Requests thrown out of the cache.
    """

    side: str
    load: str
    round: int
    result: LoadResult
    counts: AcceptanceCounts
    prefix_hits: int
    preemptions: int


@dataclass(frozen=True)
class Measured:
    """All records of some rounds, and what does not change from one to the next."""

    records: list[Record]
    rounds: int
    kv_blocks: dict[str, int]  # by side


@contextmanager
def running(plan: Plan, logs: Path, progress: Progress) -> Iterator[dict[str, Server]]:
    """Every server of the plan, by its name; all are ended with the block."""
    with ExitStack() as stack:
        servers = {}
        for some in _some_at_once(list(plan.servers.items())):
            for name, side in some:
                servers[name] = _launch(plan, side, logs)
                stack.callback(kill_server, servers[name])
            for name, _ in some:
                progress(f"starting {name}")
                wait_for_health(servers[name])
        yield servers


def _some_at_once(
    servers: Sequence[tuple[str, Side]],
) -> Iterator[Sequence[tuple[str, Side]]]:
    """Two: one loads while the other compiles; more would take too much memory."""
    for first in range(0, len(servers), 2):
        yield servers[first : first + 2]


def measure(plan: Plan, logs: Path, progress: Progress) -> Iterator[Measured]:
    """Every side under every load, `Plan.rounds` times.

    The order of the sides turns round from one round to the next, so that a machine
    that gets slower is not held against those that come last.

    Args:
        plan: What to compare.
        logs: Folder for the servers' logs.
        progress: Called with a few words before each step.

    Yields:
        Whenever servers have ended: all that was measured until then.
    """
    records: list[Record] = []
    for numbers in _rounds_by_server(plan):
        with running(plan, logs, progress) as servers:
            records += _rounds(plan, servers, numbers, progress)
            blocks = {
                side.name: servers[side.server].num_kv_blocks() for side in plan.sides
            }
        yield Measured(list(records), numbers.stop, blocks)


def _rounds_by_server(plan: Plan) -> list[range]:
    """The rounds' numbers, those together that one server of each name has."""
    if not plan.fresh_servers:
        return [range(plan.rounds)]
    return [range(number, number + 1) for number in range(plan.rounds)]


def _rounds(
    plan: Plan, servers: dict[str, Server], numbers: range, progress: Progress
) -> list[Record]:
    """Some rounds of every load, after one to warm up."""
    records = []
    for load in plan.loads:
        for side in plan.sides:
            progress(f"warming up: {side.name}, {load.name}")
            _once(plan, servers[side.server], side, _shortened(load), -1)
        for number in numbers:
            for side in plan.sides[:: -1 if number % 2 else 1]:
                progress(f"{load.name}, round {number + 1}: {side.name}")
                records.append(_once(plan, servers[side.server], side, load, number))
    return records


def num_steps(plan: Plan) -> int:
    """How often `measure` reports progress."""
    starts = len(_rounds_by_server(plan))
    loads = len(plan.sides) * len(plan.loads) * (starts + plan.rounds)
    return starts * len(plan.servers) + loads


def _launch(plan: Plan, side: Side, logs: Path) -> Server:
    arguments = [
        *("--dtype", plan.dtype, "--max-model-len", str(plan.max_model_len)),
        *("--max-num-seqs", str(plan.largest_batch)),
        *(["--enforce-eager"] if plan.enforce_eager else []),
    ]
    if side.speculative_config is not None:
        arguments += ["--speculative-config", json.dumps(side.speculative_config)]
    # The dev mode lets the prefix cache be emptied. The cache is kept small, since
    # all servers live side by side.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment |= os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
    environment.update(plan.environment)
    return launch_server(Path(plan.target), logs, arguments, environment)


def _shortened(load: Load) -> Load:
    return Load(load.name, load.prompts[: load.concurrency], load.concurrency, 8)


def _once(plan: Plan, server: Server, side: Side, load: Load, number: int) -> Record:
    # A cached prompt would make the second round another measurement.
    server.reset_prefix_cache()
    before = _counters(server)
    result = run_load(
        server.url,
        plan.target,
        load.prompts,
        load.concurrency,
        load.output_tokens,
        chat_template=plan.chat_template,
        extra_body=side.extra_body,
    )
    after = _counters(server)
    counts = after.counts - before.counts
    _require_length(side, counts)
    return Record(
        side.name,
        load.name,
        number,
        result,
        counts,
        after.prefix_hits - before.prefix_hits,
        after.preemptions - before.preemptions,
    )


def _require_length(side: Side, counts: AcceptanceCounts) -> None:
    # vLLM drops what it does not know in `vllm_xargs`, without a word.
    asked = side.num_speculative_tokens
    if side.per_request and counts.draft_tokens > counts.drafts * (asked or 0):
        raise MTPError(
            f"{side.name}: the server drafted {counts.draft_tokens} tokens in "
            f"{counts.drafts} drafts, so it does not give a request the number that "
            "it asks for; name one number only with --num-speculative-tokens"
        )


@dataclass(frozen=True)
class _Counters:
    counts: AcceptanceCounts
    prefix_hits: int
    preemptions: int


def _counters(server: Server) -> _Counters:
    return _Counters(
        server.acceptance(),
        int(server.metric("prefix_cache_hits_total")),
        int(server.metric("num_preemptions_total")),
    )
