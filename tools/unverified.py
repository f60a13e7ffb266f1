# SPDX-License-Identifier: Apache-2.0
"""Drafts that are taken without verification: what they give, and what they cost.

    python -m tools.unverified --drafter cheap shared --out docs/unverified

Writes OUT.json and OUT.png and prints the tables of docs/unverified.md. It all runs in
plain torch on one device: the target answers each prompt alone, then with each drafter
under each rule (`vllm_mtp.evaluation.unverified`). Of the same drafter stands beside it
what verified decoding of the target's own answers gives, and, where the drafter is the
whole target, what merged verification would (`vllm_mtp.evaluation.merged`, computed).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tools.command import Parser, alone, count, finish
from vllm_mtp.data.demo_target import ensure_demo_target
from vllm_mtp.data.render import Renderer
from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.checkpoint import load_drafter
from vllm_mtp.drafter.cost import draft_cost
from vllm_mtp.drafter.target_facts import TargetFacts
from vllm_mtp.engine import front_end
from vllm_mtp.errors import MTPError, in_one_line
from vllm_mtp.evaluation.merged import (
    ForwardCost,
    in_two_forwards,
    is_mergeable,
    merged,
)
from vllm_mtp.evaluation.offline import accepted_lengths, walk
from vllm_mtp.evaluation.unverified import (
    Answer,
    Prompts,
    Rule,
    answer,
    compare,
    read_prompts,
    takes_several,
)
from vllm_mtp.installed import installed_folder
from vllm_mtp.markdown import table
from vllm_mtp.metrics import mean_length
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import load_frozen
from vllm_mtp.torch_host.texts import streams_of

ROOT = Path(__file__).parent.parent
PROMPTS = ROOT / "examples" / "prompts" / "unseen.jsonl"
PROBABILITIES, ENTROPIES = (0.95, 0.9, 0.8, 0.7, 0.5, 0.3), (0.5, 2.0)
COLORS = ("#4c72b0", "#c44e52", "#55a868", "#8172b3", "#937860")
TAKEN_HEAD = (
    "Drafter", "Taken while", "Tokens per forward", "drafts counted", "Drafts taken",
    "target agrees", "nats given up", "Tokens agreed", "Same from the start",
    "Same answers",
)  # fmt: skip
MERGED_HEAD = (
    "Drafter", "Rows of a block", "Tokens per forward, two forwards",
    "merged (computed)", "Rows per token, two forwards", "merged (computed)",
)  # fmt: skip


def main() -> int:
    """Run from the command line; returns the exit code."""
    args = _arguments()
    return finish("unverified", lambda: _run(args), "nothing is written")


def _run(args: argparse.Namespace) -> int:
    if not Path(args.out).parent.is_dir():  # before the work, not after it
        raise MTPError(f"--out {args.out}: its folder is not there; make it")
    results = _measure(args)
    plot(results, Path(f"{args.out}.png"))
    Path(f"{args.out}.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(taken_table(results) + "\n\n" + merged_table(results))
    return 0


def kept_results() -> dict[str, Any]:
    """Those that docs/unverified.md shows."""
    return json.loads((ROOT / "docs" / "unverified.json").read_text("utf-8"))


def _arguments() -> argparse.Namespace:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", help="a folder (default: the demo's target)")
    parser.add_argument("--drafter", nargs="+", required=True, help="names or folders")
    parser.add_argument("--prompts", default=str(PROMPTS), help="JSONL with 'prompt'")
    parser.add_argument("--limit", type=count, default=16, help="prompts")
    parser.add_argument("--max-tokens", type=count, default=128, help="of an answer")
    parser.add_argument("--probability", type=float, nargs="*", default=PROBABILITIES)
    parser.add_argument("--entropy", type=float, nargs="*", default=ENTROPIES)
    parser.add_argument("--batch", type=count, default=16, help="texts at once")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=str(ROOT / "docs" / "unverified"))
    return parser.parse_args()


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    target = Path(args.target) if args.target else ensure_demo_target()
    rules = [Rule("probability", bound) for bound in args.probability]
    rules += [Rule("entropy", bound) for bound in args.entropy]
    host = HFTarget(load_frozen(target, args.dtype, args.device))
    drafters = {
        name: BoundDrafter(
            load_drafter(
                _folder(name), dtype=host.model.dtype, device=torch.device(args.device)
            ).requires_grad_(False),
            host,
        )
        for name in args.drafter
    }
    for bound in drafters.values():
        bound.drafter.config.target.require_same(TargetFacts.from_folder(target))
    texts = _prompts(args.prompts, args.limit)
    token_ids, stop = alone(as_served, target, texts)
    size = args.batch if takes_several(host) else 1
    streams = {i for b in drafters.values() for i in streams_of(b.drafter.config)}
    own: list[Answer] = []
    taken: dict[str, dict[Rule, list[Answer]]] = {
        name: {rule: [] for rule in rules} for name in drafters
    }
    batches = [token_ids[i : i + size] for i in range(0, len(token_ids), size)]
    total = len(batches) * (1 + len(drafters) * len(rules))
    with tqdm(total=total, unit="batch", mininterval=5) as bar:
        for batch in batches:
            prompts: Prompts = read_prompts(host, batch, streams)
            own += answer(prompts, args.max_tokens, stop)
            bar.update()
            for name, bound in drafters.items():
                for rule in rules:
                    made = answer(prompts, args.max_tokens, stop, bound, rule)
                    taken[name][rule] += made
                    bar.update()
    rows = [
        {
            "input_ids": prompt + one.token_ids,
            "loss_spans": [[len(prompt), len(prompt) + len(one.token_ids)]],
        }
        for prompt, one in zip(token_ids, own, strict=True)
    ]
    return {
        "settings": {
            "target": target.name,
            "prompts": Path(args.prompts).name,
            "limit": len(token_ids),
            "max_tokens": args.max_tokens,
            "dtype": args.dtype,
        },
        "own_tokens": sum(len(one.token_ids) for one in own),
        "drafters": {
            name: _results_of(bound, taken[name], own, rows)
            for name, bound in drafters.items()
        },
    }


def _results_of(
    bound: BoundDrafter,
    taken: dict[Rule, list[Answer]],
    own: Sequence[Answer],
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    config = bound.drafter.config
    k = config.num_speculative_tokens
    by_k = [of for row in rows for of in accepted_lengths(bound, row, k)]
    verified = [
        mean_length(reduce(add, (walk(of[n], n) for of in by_k)))
        for n in range(1, k + 1)
    ]
    lengths = [of[k] for of in by_k]
    results: dict[str, Any] = {
        "k": k,
        "draft_weights": draft_cost(config).relative_weights,
        "verified_acceptance_length_by_k": verified,
        "unverified": [
            asdict(rule) | asdict(compare(answers, own))
            for rule, answers in taken.items()
        ],
    }
    if is_mergeable(config):
        results["merged"] = [
            {
                "k": n,
                "two_forwards": _cost(in_two_forwards(lengths, n)),
                "merged_computed": _cost(merged(lengths, n)),
            }
            for n in range(2, k + 1)
        ]
    return results


def _cost(cost: ForwardCost) -> dict[str, float]:
    return asdict(cost) | {
        "tokens_per_forward": cost.tokens_per_forward,
        "rows_per_token": cost.rows_per_token,
    }


def _folder(name: str) -> Path:
    return Path(name) if Path(name).is_dir() else installed_folder(name)


def _prompts(file: str, limit: int) -> list[str]:
    """Those that follow each other in the file are alike, so they are taken from all
    over it."""
    try:
        lines = Path(file).read_text("utf-8").splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MTPError(
            f"--prompts {file}: expected a JSONL file with a 'prompt' in each line "
            f"({in_one_line(error, 100)})"
        ) from None
    if not 1 <= limit <= len(prompts):
        raise MTPError(
            f"--limit: got {limit}, expected 1 to {len(prompts)}, the prompts of {file}"
        )
    return prompts[:: len(prompts) // limit][:limit]


def as_served(
    target: Path, prompts: Sequence[str]
) -> tuple[list[list[int]], frozenset[int]]:
    """Token ids of each prompt as the chat endpoint renders it, and the tokens that end
    an answer. Imports vLLM, so it is for a process of its own."""
    chat = front_end(target)
    renderer = Renderer(chat)
    return [renderer.token_ids_of(prompt) for prompt in prompts], chat.end_token_ids


def taken_table(results: dict[str, Any]) -> str:
    """Every drafter's verified decoding, and its drafts taken by each rule."""
    rows: list[tuple[str, ...]] = []
    for name, found in results["drafters"].items():
        length = found["verified_acceptance_length_by_k"][-1]
        weights = 1 + found["draft_weights"]
        rows.append((
            name, "verified (lossless)", f"{length:.2f}", f"{length / weights:.2f}",
            "", "100 %", "0", "100 %", "100 %", "100 %",
        ))  # fmt: skip
        for row in found["unverified"]:
            kind = {"probability": "p ≥", "entropy": "entropy ≤"}[row["kind"]]
            rows.append((
                name, f"{kind} {row['bound']:g}",
                f"{row['tokens_per_forward']:.2f}",
                f"{row['tokens_per_forward'] / weights:.2f}", str(row["drafts_taken"]),
                _percent(row["drafts_agreed"]), f"{row['given_up']:.2f}",
                _percent(row["agreed"]), _percent(row["same_start"]),
                _percent(row["same_answers"]),
            ))  # fmt: skip
    return table(TAKEN_HEAD, rows)


def merged_table(results: dict[str, Any]) -> str:
    """What merged verification would give where it could be."""
    rows = [
        (
            name,
            str(row["k"]),
            f"{row['two_forwards']['tokens_per_forward']:.2f}",
            f"{row['merged_computed']['tokens_per_forward']:.2f}",
            f"{row['two_forwards']['rows_per_token']:.1f}",
            f"{row['merged_computed']['rows_per_token']:.1f}",
        )
        for name, found in results["drafters"].items()
        for row in found.get("merged", ())
    ]
    return table(MERGED_HEAD, rows)


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def plot(results: dict[str, Any], path: Path) -> None:
    """Tokens per forward over agreement, a line for each drafter and kind of rule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for color, (name, found) in zip(COLORS, results["drafters"].items(), strict=False):
        for kind, style in (("probability", "o-"), ("entropy", "s--")):
            some = [row for row in found["unverified"] if row["kind"] == kind]
            if some:
                x = [100 * row["agreed"] for row in some]
                y = [row["tokens_per_forward"] for row in some]
                axes.plot(x, y, style, color=color, label=f"{name}, {kind}")
        length = found["verified_acceptance_length_by_k"][-1]
        axes.plot([100], [length], "*", color=color, markersize=15)
        axes.annotate(
            "verified", (100, length), fontsize=8, xytext=(-8, 6),
            textcoords="offset points", ha="right",
        )  # fmt: skip
    axes.set_xlabel("tokens that the target would have said itself there, %")
    axes.set_ylabel("tokens per forward of the target")
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
