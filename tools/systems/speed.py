# SPDX-License-Identifier: Apache-2.0
"""What a draft costs, and what it gives, in vLLM at one request."""

import json
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.command import alone
from tools.systems.reference import HELD_OUT_SET, UNSEEN_PROMPTS, Reference
from tools.systems.runs import Run, of_each
from vllm_mtp.bench.measure import measure
from vllm_mtp.bench.plan import Load, Plan, Side, drafter_side, plain_side
from vllm_mtp.bench.servers import sigterm_unwinds
from vllm_mtp.bench.step_profile import StepProfile, beside_plain
from vllm_mtp.bench.steps import StepsWanted, profile_steps
from vllm_mtp.bench.summary import lines_of

_MODEL_LEN = 1024
_STEPS = 40
_TOKENS = 128


def cost(
    runs: Iterable[Run], target: str, reference: Reference, dtype: str, rounds: int
) -> None:
    """Time a draft, and a step with it, beside a step without. Rounds in this type that
    were measured before count.

    Args:
        runs: Trained ones; those that vLLM cannot run are left out.
        target: The target's folder.
        reference: Its first row is the request.
        dtype: Of the target, to be timed.
        rounds: How often both sides take turns.
    """
    row = reference.rows[0]
    prompt = tuple(row["input_ids"][: row["loss_spans"][0][0]])

    def measure_cost(run: Run) -> None:
        known = run.results().get("cost", {})
        found = known["rounds"] if known.get("dtype") == dtype else []
        if len(found) >= rounds or not run.is_served:
            return
        profiles: list[StepProfile] = []
        for side in (plain_side(), _side(run)):
            profiles += alone(profile_steps, _steps(side, target, dtype, prompt))
        beside = beside_plain(profiles[1], profiles)
        assert beside is not None, "the second side drafts"
        found = [*found, beside._asdict()]
        medians = {
            n: statistics.median(each[n] for each in found) for n in beside._fields
        }
        run.keep("cost", {**medians, "dtype": dtype, "rounds": found})
        print(f"{run.name}: draft {medians['draft']:.2f} steps", flush=True)

    # All runs once, then again: of a night that ends early each has something.
    of_each([*runs] * rounds, measure_cost)


def _steps(side: Side, target: str, dtype: str, prompt: tuple[int, ...]) -> StepsWanted:
    settings = {
        "dtype": dtype,
        "max_model_len": _MODEL_LEN,
        "max_num_seqs": 1,
        "enforce_eager": True,
    }
    return StepsWanted(side, target, settings, (prompt,), (1,), _STEPS)


def _side(run: Run) -> Side:
    k = run.config.num_speculative_tokens
    return drafter_side(run.name, str(run.folder), k)


def predicted(results: dict[str, Any]) -> float | None:
    """Tokens per second over those without drafts, by what was measured apart: tokens
    of a step over its time; None where one is not known."""
    if not {"served", "cost"} <= set(results):
        return None
    held_out = results["served"]["sets"][HELD_OUT_SET]
    return held_out["acceptance_length"] / results["cost"]["step"]


def best(runs: Iterable[Run], count: int) -> list[Run]:
    """The systems that are predicted to be fastest; arms are none."""
    known = {
        run.name: (ratio, run)
        for run in runs
        if not run.preset.is_arm and (ratio := predicted(run.results())) is not None
    }
    ordered = sorted(known.values(), key=lambda pair: -pair[0])
    return [run for _, run in ordered[:count]]


def speed(
    runs: Sequence[Run], target: str, dtype: str, count: int, prompts: int, rounds: int
) -> None:
    """Measure tokens per second of the best systems, each beside no speculation.

    Two servers take turns, one request at a time.

    Args:
        runs: Trained ones, with their `cost`.
        target: The target's folder.
        dtype: Of the target, to be timed.
        count: How many systems.
        prompts: Of each round.
        rounds: How often both sides take turns.
    """
    lines = UNSEEN_PROMPTS.read_text("utf-8").splitlines()
    # Of every kind some: the file has one kind behind the other.
    some = lines[:: max(len(lines) // prompts, 1)][:prompts]
    texts = tuple(json.loads(line)["prompt"] for line in some)

    def measure_speed(run: Run) -> None:
        if run.results().get("speed", {}).get("dtype") == dtype:
            return
        plan = Plan(
            target=target,
            dtype=dtype,
            max_model_len=_MODEL_LEN,
            rounds=rounds,
            sides=(plain_side(), _side(run)),
            loads=(Load("one request", texts, 1, _TOKENS),),
            enforce_eager=True,
        )
        with tempfile.TemporaryDirectory() as logs, sigterm_unwinds():
            (measured,) = measure(plan, Path(logs), lambda _: None)
        plain, ours = lines_of(plan, measured.records)
        found = {
            "tokens_per_s": asdict(ours.tokens_per_s),
            "tokens_per_s_alone": asdict(plain.tokens_per_s),
            "ratio": asdict(ours.ratio),
            "same_texts": ours.same_texts,
            "texts": ours.texts,
            "dtype": dtype,
        }
        run.keep("speed", found)
        print(f"{run.name}: {ours.ratio.median:.2f} times as fast", flush=True)

    of_each(best(runs, count), measure_speed)
