# SPDX-License-Identifier: Apache-2.0
"""What a draft costs: milliseconds per decoding step and part, on an 8B shape."""

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from clock import Times, decoding_times, recorded
from engine import Replays, Side, started, with_graphs
from results import Row, spread_of
from sides import make_shape

Record = Callable[[Row], None]
# (requests, tokens of context)
CELLS = [(batch, context) for context in (1024, 8192) for batch in (1, 8, 32)]
MORE_CELLS = [(batch, 1024) for batch in (16, 64, 128)]
DRY_CELLS = [(batch, context) for context in (40, 100) for batch in (1, 2, 3)]
DRY_MORE_CELLS = [(4, 40)]
NUM_TOKENS = 4
MOST_TOKENS = 190  # per request of a cell
ROUNDS = 2


def cost(
    name: str,
    shape: str,
    cells: list[tuple[int, int]],
    dry: bool,
    work: Path,
    record: Record,
) -> bool:
    """Measure one side in an engine of its own, which has the device to itself.

    Args:
        name: The side.
        shape: The target's, of `sides`.
        cells: Requests and tokens of context.
        dry: A single round of few tokens.
        work: Folder for weights.
        record: Takes each row when it is known.

    Returns:
        Whether every cell was measured, with the graphs that were asked for.
    """
    batches = tuple(sorted({batch for batch, _ in cells}))
    target = make_shape(shape, work / shape)
    all_ok = True
    with started(
        *(name, target, NUM_TOKENS, work),
        dtype="bfloat16",
        load_format="dummy",
        gpu_memory_utilization=0.85,
        max_model_len=max(context for _, context in cells) + MOST_TOKENS,
        max_num_seqs=max(batches),
        **with_graphs(batches, NUM_TOKENS),
    ) as side:
        ours = name not in ("none", "eagle3")
        tried = side.has_draft_graphs or torch.cuda.is_available()
        ways = ([False, True] if tried else [False]) if ours else [True]
        for batch, context in cells:
            for row in cell(side, batch, context, ways, dry):
                record(row)
                all_ok &= "failed" not in row
    return all_ok


def cell(
    side: Side, batch: int, context: int, ways: list[bool], dry: bool
) -> list[Row]:
    """One batch size and context: with the drafter's graphs and without, in turns.

    Args:
        side: The engine.
        batch: Requests.
        context: Tokens of each prompt.
        ways: Whether the drafter's graphs may be used; all that are to be measured.
        dry: A single round of few tokens.
    """
    head: Row = {"side": side.name, "batch": batch, "context": context}
    head |= {"kv_blocks": side.kv_blocks, "num_tokens": side.num_tokens}
    if side.capacity < (needed := batch * (context + MOST_TOKENS)):
        failed = f"KV pool of {side.capacity} tokens, {needed} needed"
        return [head | {"failed": failed}]
    times = {way: Times() for way in ways}
    replays = {way: Replays() for way in ways}
    for _ in range(1 if dry else ROUNDS):
        for way in ways:
            with ExitStack() as stack:
                if not way:
                    stack.enter_context(side.without_draft_graphs())
                found, replayed = decode(side, batch, context, dry)
            times[way] += found
            replays[way] += replayed
    rows = []
    for way in ways:
        row = dict(head)
        if side.num_tokens:
            row["draft_graphs"] = way and torch.cuda.is_available()
        for part, values in asdict(times[way]).items():
            if values:
                row[f"{part}_ms"] = spread_of(values)
        row |= {f"{who}_replays": n for who, n in asdict(replays[way]).items()}
        if side.failed_drafts:
            row["failed"] = f"{side.failed_drafts} drafts failed; the log says why"
        elif "step_ms" not in row:
            row["failed"] = "no step in which all requests decode"
        elif torch.cuda.is_available():
            asked = (True, bool(side.num_tokens) and way)
            if (replays[way].target > 0, replays[way].drafter > 0) != asked:
                row["failed"] = "graphs were not used as asked"
        rows.append(row)
    return rows


def decode(side: Side, batch: int, context: int, dry: bool) -> tuple[Times, Replays]:
    """Let ``batch`` requests decode behind prompts of ``context`` tokens.

    From the second round on the prompts are found in the prefix cache.
    """
    draw = random.Random(batch * context)
    vocab = range(side.config.model_config.get_vocab_size())
    prompts = [draw.choices(vocab, k=context) for _ in range(batch)]
    # The first requests decode while the last ones are still being prefilled; and with
    # random weights drafts may be accepted, which makes fewer steps.
    budget = side.config.scheduler_config.max_num_batched_tokens
    max_tokens = min(batch * context // budget + (12 if dry else 100), MOST_TOKENS)
    with recorded(side.llm) as steps:
        replays = side.answer(prompts, max_tokens).replays
    return decoding_times(steps, batch, side.num_tokens), replays
