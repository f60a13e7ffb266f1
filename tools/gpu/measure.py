#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure the method on a device, all sides of a run in one process and in turns.

python tools/gpu/measure.py answers --out $OUT      is the text the target's; how fast?
python tools/gpu/measure.py cost --out $OUT         milliseconds per step, by part
python tools/gpu/measure.py all --dry-run --out FOLDER        tiny, also on a CPU
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]

# (requests, tokens of context)
CELLS = [
    *((1, context) for context in (1024, 4096, 16384, 32000)),
    *((8, context) for context in (1024, 4096, 16384)),
    *((32, context) for context in (1024, 4096)),
    *((batch, 1024) for batch in (128, 256)),
]
DRY_CELLS = [(1, 40), (4, 100)]
BATCHES, DRY_BATCHES = (1, 8, 40), (1, 3)
# A first draft that is the target's own computation can only lose at a float tie.
EXACT_SIDES = ("shared:all", "shared")
LEAST_EXACT = 0.97
FP32_TIE_MARGIN = 1e-4
MOST_TOKENS = 190  # per request of a cell


def main() -> int:
    options = parse()
    # Before vLLM is imported. In one process, so that the clock reaches the runner.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if options.runner == "v2" else "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sys.path.append(str(ROOT))
    options.out.mkdir(parents=True, exist_ok=True)
    ok = True
    for name, run in (("answers", answers), ("cost", cost)):
        if options.what in (name, "all"):
            with tempfile.TemporaryDirectory() as work:
                rows, passed = run(options, Path(work))
            write(name, rows, options)
            ok &= passed
    return 0 if ok else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["answers", "cost", "all"])
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--name", default="", help="put into the files' names")
    parser.add_argument("--runner", choices=["v1", "v2"], default="v1")
    parser.add_argument("--target", help="a folder, demo, or a shape of sides.py")
    parser.add_argument(
        "--sides", nargs="+", help="see sides.py; the first is the base"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=4, help="drafted per step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--memory", type=float, default=0.88, help="of the device's")
    parser.add_argument("--dry-run", action="store_true", help="tiny, eager")
    return parser.parse_args()


def answers(options: argparse.Namespace, work: Path) -> tuple[list[Row], bool]:
    """Greedy answers: equality with the first side's, acceptance, tokens per second."""
    from engine import start_all
    from sides import prompts_for, target_with_weights

    dry = options.dry_run
    target = target_with_weights(options.target or "tiny", work)
    names = options.sides or ["none", "shared:all", "shared:0-1,own:2,3"]
    sides, rows = start_all(
        *(names, options.memory, target, options.tokens, work),
        dtype=options.dtype,
        enforce_eager=options.eager or dry,
        max_model_len=256 if dry else 1024,
        max_num_seqs=max(BATCHES),
    )
    ok = not rows
    batches = DRY_BATCHES if dry else BATCHES
    prompts = prompts_for(target, max(batches))
    for batch in batches:
        for row in turns(sides, prompts, batch, options):
            ok &= row["different"] == 0
            if row["side"] in EXACT_SIDES:
                ok &= (row["first_position"] or 0.0) >= LEAST_EXACT
            rows.append(row)
    for side in sides:
        side.stop()
    return rows, ok


def turns(
    sides: list[Any], prompts: list[list[int]], batch: int, options: argparse.Namespace
) -> list[Row]:
    """One number of requests at once: every round asks all sides the same."""
    from vllm_mtp.evaluation.equality import BF16_TIE_MARGIN, compare_greedy

    margin = BF16_TIE_MARGIN if options.dtype == "bfloat16" else FP32_TIE_MARGIN
    max_tokens, least = (10, 2) if options.dry_run else (128, 8)
    groups = [
        prompts[i : i + batch] for i in range(0, min(max(batch, least), 40), batch)
    ]
    # Logprobs tell a tie from a difference. They cost time: this round is not timed.
    checked = [[s.answer(group, max_tokens, 5) for group in groups] for s in sides]
    rates: list[list[float]] = [[] for _ in sides]
    for _ in range(options.rounds):
        for side, found in zip(sides, rates, strict=True):
            side.llm.reset_prefix_cache()
            given = [side.answer(group, max_tokens) for group in groups]
            seconds = sum(answer.seconds for answer in given)
            found.append(max_tokens * sum(map(len, groups)) / seconds)
    rows = []
    for side, mine, found in zip(sides, checked, rates, strict=True):
        verdicts = [
            compare_greedy(
                a.token_ids, a.logprobs, b.token_ids, tie_margin=margin
            ).verdict
            for first, own in zip(checked[0], mine, strict=True)
            for a, b in zip(first.outputs, own.outputs, strict=True)
        ]
        counts = sum((answer.counts for answer in mine[1:]), mine[0].counts)
        ratios = [a / b for a, b in zip(found, rates[0], strict=True)]
        rows.append(
            {"side": side.name, "batch": batch, "kv_blocks": side.kv_blocks}
            | {v: verdicts.count(v) for v in ("equal", "tie", "different")}
            | {"drafts": counts.drafts, "acceptance_length": counts.acceptance_length}
            | {"first_position": next(iter(counts.acceptance_per_position), None)}
            | {"tokens_per_s": spread_of(found), "ratio": spread_of(ratios)}
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def cost(options: argparse.Namespace, work: Path) -> tuple[list[Row], bool]:
    """Milliseconds per decoding step and part, on a target with dummy weights."""
    from engine import start_all
    from sides import make_shape, usual_sides

    dry = options.dry_run
    shape = options.target or ("tiny" if dry else "llama-8b")
    target = make_shape(shape, work / shape)
    cells = DRY_CELLS if dry else CELLS
    names = options.sides or usual_sides(shape)
    sides, rows = start_all(
        *(names, options.memory, target, options.tokens, work),
        dtype=options.dtype,
        load_format="dummy",
        enforce_eager=options.eager or dry,
        max_model_len=max(context for _, context in cells) + MOST_TOKENS,
        max_num_seqs=max(batch for batch, _ in cells),
    )
    broken: dict[str, str] = {}
    for batch, context in cells:
        for row in cell(sides, batch, context, options.rounds, broken):
            rows.append(row)
            print(json.dumps(row), flush=True)
    for side in sides:
        side.stop()
    return rows, not any("failed" in row for row in rows) or not dry


def cell(
    sides: list[Any], batch: int, context: int, rounds: int, broken: dict[str, str]
) -> list[Row]:
    """One batch size and context: all sides in turn, round after round.

    Args:
        sides: All of them.
        batch: Requests.
        context: Tokens of each prompt.
        rounds: How often.
        broken: Sides whose engine has died, with the reason; added to.
    """
    from clock import Times

    times = {side.name: Times() for side in sides}
    needed = batch * (context + MOST_TOKENS)
    for _ in range(rounds):
        for side in sides:
            if side.capacity >= needed and side.name not in broken:
                try:
                    times[side.name] += decode(side, batch, context)
                except Exception as error:
                    broken[side.name] = f"{type(error).__name__}: {error}"[:600]
    rows: list[Row] = []
    for side in sides:
        row: Row = {"side": side.name, "batch": batch, "context": context}
        row |= {"kv_blocks": side.kv_blocks, "num_tokens": side.num_tokens}
        for part, values in asdict(times[side.name]).items():
            if values:
                row[f"{part}_ms"] = spread_of(values)
        base = rows[0] if rows else row
        if "step_ms" in row and "step_ms" in base:
            # The acceptance length from which on drafting makes decoding faster.
            ratio = row["step_ms"]["median"] / base["step_ms"]["median"]
            row["break_even"] = round(ratio, 3)
        if side.name in broken:
            row["failed"] = broken[side.name]
        elif side.capacity < needed:
            row["failed"] = f"KV pool of {side.capacity} tokens, {needed} needed"
        elif "step_ms" not in row:
            row["failed"] = "no step in which all requests decode"
        rows.append(row)
    return rows


def decode(side: Any, batch: int, context: int) -> Any:
    """Let ``batch`` requests decode behind prompts of ``context`` tokens.

    From the second round on the prompts are found in the prefix cache.
    """
    from clock import decoding_times, recorded

    draw = random.Random(batch * context)
    vocab = range(side.config.model_config.get_vocab_size())
    prompts = [draw.choices(vocab, k=context) for _ in range(batch)]
    # The first requests decode while the last ones are still being prefilled.
    budget = side.config.scheduler_config.max_num_batched_tokens
    max_tokens = min(batch * context // budget + 32, MOST_TOKENS)
    with recorded(side.llm) as steps:
        side.answer(prompts, max_tokens)
    return decoding_times(steps, batch, side.num_tokens)


def spread_of(values: list[float]) -> Row:
    """Median, and the tenth and ninetieth of a hundred."""
    ordered = sorted(values)
    tenth = (len(ordered) - 1) / 10
    return {
        "median": round(statistics.median(ordered), 3),
        "p10": round(ordered[round(tenth)], 3),
        "p90": round(ordered[round(9 * tenth)], 3),
        "count": len(ordered),
    }


def write(name: str, rows: list[Row], options: argparse.Namespace) -> None:
    """JSON with everything, Markdown with the table."""
    import torch

    from vllm_mtp.markdown import plain, table

    gpu = torch.cuda.is_available()
    facts = {
        "device": torch.cuda.get_device_name() if gpu else platform.machine(),
        "versions": {n: version(n) for n in ("vllm", "torch", "vllm-mtp")},
        "options": {key: str(value) for key, value in vars(options).items()},
    }
    title = f"{name}-{options.name}" if options.name else name
    text = json.dumps({"facts": facts, "rows": rows}, indent=1)
    (options.out / f"{title}.json").write_text(text + "\n", "utf-8")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"# {title}", "", *(f"- {k}: {v}" for k, v in facts.items()), ""]
    lines.append(
        table(keys, ([plain(shown(row.get(k))) for k in keys] for row in rows))
    )
    (options.out / f"{title}.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines), flush=True)


def shown(value: Any) -> str:
    """A cell of the table: a spread as its median and ends."""
    if isinstance(value, dict):
        return f"{value['median']} ({value['p10']} to {value['p90']})"
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
