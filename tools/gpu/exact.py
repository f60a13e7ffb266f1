# SPDX-License-Identifier: Apache-2.0
"""Whether answers stay the target's, with CUDA graphs and without; and whether a draft
waits for the device. Tiny targets of random weights."""

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from engine import Answers, Side, started, with_graphs
from results import Row
from sides import make_exact_target

from vllm_mtp.engine import drafter_of
from vllm_mtp.evaluation.equality import BF16_TIE_MARGIN, compare_greedy

NUM_TOKENS = 4
BATCHES, DRY_BATCHES = (1, 3, 8), (1, 3)
WHOLE = "shared:all"  # its first draft is the target's own computation
SIDES = ("none", WHOLE, "shared:0-1,own:2,3")
# What a first draft of the whole target can lose to float ties.
LEAST_FIRST = {"bfloat16": 0.97, "float32": 0.99}
TIE_MARGIN = {"bfloat16": BF16_TIE_MARGIN, "float32": 1e-2}
"""Triton's attention multiplies float32 with the 10 bits of TF32."""

Record = Callable[[Row], None]


def exactness(dtype: str, dry: bool, work: Path, record: Record) -> bool:
    """Compare every side with the target alone under the same graphs.

    Args:
        dtype: Of the target; on a GPU vLLM takes another attention for each.
        dry: Fewer requests and tokens.
        work: Folder for weights.
        record: Takes each row when it is known.

    Returns:
        Whether all rows are as they must be.
    """
    batches = DRY_BATCHES if dry else BATCHES
    max_tokens = 8 if dry else 64
    target = make_exact_target(work / "target")
    draw = random.Random(0)
    prompts = [draw.choices(range(512), k=20 + i) for i in range(max(batches))]
    all_ok = True
    for graphs in (False, True):
        alone: dict[int, Answers] = {}
        for name in SIDES:
            with side_of(name, target, work, dtype, batches, graphs) as side:
                can = bool(side.num_tokens) and may_have_draft_graphs(side, graphs)
                ways = (False, True) if can else (False,)
                for draft_graphs, batch in itertools.product(ways, batches):
                    with ExitStack() as stack:
                        if side.num_tokens and not draft_graphs:
                            stack.enter_context(side.without_draft_graphs())
                        mine = side.answer(prompts[:batch], max_tokens, 5)
                    first = alone.setdefault(batch, mine)
                    head = {"side": name, "target_graphs": graphs, "batch": batch}
                    head |= {"draft_graphs": draft_graphs, "attention": side.attention}
                    row = head | compared(first, mine, dtype)
                    row["failed_drafts"] = side.failed_drafts
                    faults = faults_of(row, dtype, captured=torch.cuda.is_available())
                    record(row | {"faults": "; ".join(faults)})
                    all_ok &= not faults
    return all_ok


def may_have_draft_graphs(side: Side, asked: bool) -> bool:
    """Whether drafts with graphs are to be tried: on a GPU also where the drafter has
    not got the graphs that it was asked to have, since that is a fault to be seen."""
    return side.has_draft_graphs or (asked and torch.cuda.is_available())


def side_of(
    name: str,
    target: Path,
    work: Path,
    dtype: str,
    batches: tuple[int, ...],
    graphs: bool,
) -> Any:
    """A side on a tiny target."""
    settings: dict[str, Any] = {"enforce_eager": True}
    if graphs:
        settings = with_graphs(batches, NUM_TOKENS)
    return started(
        *(name, target, NUM_TOKENS, work),
        dtype=dtype,
        max_model_len=256,
        max_num_seqs=max(batches),
        kv_cache_memory_bytes=256 << 20,
        gpu_memory_utilization=0.5,  # an engine before it may still hold some
        **settings,
    )


def compared(alone: Answers, mine: Answers, dtype: str) -> Row:
    """How answers differ from the target's, and how they came about."""
    verdicts = [
        compare_greedy(
            a.token_ids, a.logprobs, b.token_ids, tie_margin=TIE_MARGIN[dtype]
        ).verdict
        for a, b in zip(alone.outputs, mine.outputs, strict=True)
    ]
    row: Row = {v: verdicts.count(v) for v in ("equal", "tie", "different")}
    counts = mine.counts
    row |= {"drafts": counts.drafts, "draft_calls": mine.calls}
    if counts.drafts:
        row["first_accepted"] = counts.accepted_per_position[0]
        row["acceptance_length"] = round(counts.acceptance_length, 3)
    return row | {f"{who}_replays": n for who, n in asdict(mine.replays).items()}


def faults_of(row: Row, dtype: str, captured: bool) -> list[str]:
    """What in a row is not as it must be, in words.

    Args:
        row: Of one side, graph setting and batch.
        dtype: Of the target.
        captured: Whether graphs can be captured on this device.
    """
    faults = []
    if row["different"]:
        faults.append(f"{row['different']} answers are not the target's")
    if row["failed_drafts"]:
        faults.append(f"{row['failed_drafts']} drafts failed; the log says why")
    if row["side"] == "none":
        pass
    elif not row["drafts"]:
        faults.append("nothing was drafted")
    elif (
        row["side"] == WHOLE
        and row["first_accepted"] < LEAST_FIRST[dtype] * row["drafts"]
    ):
        faults.append("first drafts of the whole target were rejected")
    expected = row["draft_calls"] if row["draft_graphs"] else 0
    if row["drafter_replays"] != expected:
        faults.append(f"{expected} replays of the drafter expected")
    if bool(row["target_replays"]) != (row["target_graphs"] and captured):
        faults.append("the target's graphs were not used as asked")
    return faults


def waits(dry: bool, work: Path, record: Record) -> bool:
    """Look for calls in a draft that make the host wait for the device.

    Two ways: the operators are watched (as the tests do on a CPU), and on a GPU
    PyTorch itself reports what synchronizes.
    """
    from tests.serving.host_syncs import host_syncs

    batches = DRY_BATCHES if dry else BATCHES
    target = make_exact_target(work / "target")
    prompts = [[(7 * i + j) % 512 for i in range(20 + j)] for j in range(max(batches))]
    all_ok = True
    with side_of(SIDES[-1], target, work, "bfloat16", batches, True) as side:
        for graphs in (False, True)[: 1 + may_have_draft_graphs(side, True)]:
            found: list[str] = []
            with ExitStack() as stack:
                if not graphs:
                    stack.enter_context(side.without_draft_graphs())
                stack.enter_context(_watched(drafter_of(side.llm), host_syncs, found))
                calls = side.answer(prompts, 8 if dry else 32).calls
            reported = torch.cuda.is_available()
            record(
                {"side": side.name, "draft_graphs": graphs, "draft_calls": calls}
                | {"waits": len(found), "where": "; ".join(sorted(set(found)))[:2000]}
                | {"reported_by_cuda": reported}
            )
            all_ok &= not found and calls > 0 and not side.failed_drafts
    return all_ok


@contextmanager
def _watched(drafter: Any, host_syncs: Any, found: list[str]) -> Iterator[None]:
    propose = drafter.propose

    def host_tensors(values: tuple[Any, ...]) -> Iterator[Any]:
        for value in values:  # vLLM says it in the attribute's name
            for name, attribute in getattr(value, "__dict__", {}).items():
                if "cpu" in name:
                    yield attribute

    def watched(*args: Any, **kwargs: Any) -> Any:
        with (
            host_syncs(host_tensors((*args, *kwargs.values()))) as ours,
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("warn")
            try:
                drafts = propose(*args, **kwargs)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.set_sync_debug_mode("default")
        found.extend(ours)
        found.extend(
            f"{warning.filename}:{warning.lineno}"
            for warning in caught
            if "synchroniz" in str(warning.message)
        )
        return drafts

    drafter.propose = watched
    try:
        yield
    finally:
        drafter.propose = propose
