# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp demo``."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from vllm_mtp.errors import MTPError
from vllm_mtp.flags import flag

if TYPE_CHECKING:
    from vllm_mtp.evaluation.demo import DemoPlan, DemoResult, Speed
    from vllm_mtp.evaluation.equality import Comparison

# Has about as many drafts accepted as the measured prompts have.
_QUESTION = "List three uses of a paper clip."
_TIE_NOTE = """\
A tie: the logits of two tokens are at most two rounding steps apart, so either is the
target's. Behind it the texts go on apart, and are not compared."""


@dataclass
class Demo:
    """Serve real prompts (ShareGPT) with stock vLLM, without and with the method, and
    print whether the texts are the target's, how fast both are, and where each token of
    one answer came from. Exit code 0 only if all texts are the target's and the
    acceptance length is above the limit."""

    target: str | None = flag("the target's folder (default: the demo target)", None)
    drafter: str | None = flag("the drafter's folder (default: found by target)", None)
    question: str = flag("whose answer to show token by token", _QUESTION)
    html: str | None = flag("write that answer as a page into this file, too", None)
    num_prompts: int = flag("how many prompts to measure with", 8)
    max_tokens: int = flag("longest answer, in tokens", 48)
    rounds: int = flag("how often each side answers all prompts", 3)
    concurrency: int = flag("requests decoded at once, besides one by one", 4)
    dtype: str | None = flag("for speed (default: this machine's fastest)", None)
    min_acceptance_length: float = flag("limit for exit code 0", 1.2)

    def run(self) -> int:
        from rich.console import Console
        from rich.padding import Padding
        from tqdm import tqdm

        from vllm_mtp.bench.cpu_settings import added, fastest_environment
        from vllm_mtp.evaluation.answer_text import answer_text, legend_text
        from vllm_mtp.evaluation.demo import num_steps, run_demo

        # Before minutes of work.
        if self.html and not Path(self.html).absolute().parent.is_dir():
            raise MTPError(
                f"--html {self.html}: there is no such folder; make it, or name another"
            )
        plan = self._plan()
        environment = fastest_environment(os.environ)
        with added(environment), tqdm(total=num_steps(plan), unit="step") as bar:

            def progress(text: str) -> None:
                bar.update(bool(bar.desc))  # the step before is done
                bar.set_description(f"{text:<42}")

            result = run_demo(plan, progress)
            bar.update()
        print(f"\n{report(plan, result)}\n\n  {plan.question}\n")
        console = Console(highlight=False)
        console.print(Padding(answer_text(result.answer), (0, 2, 1, 2)))
        console.print(Padding(legend_text(result.answer), (0, 2)))
        if self.html:
            self._write_page(Path(self.html), plan, result)
        return self._exit_code(result)

    def _plan(self) -> "DemoPlan":
        from vllm_mtp.bench.cpu_settings import fastest_dtype
        from vllm_mtp.data.demo_target import ensure_demo_target
        from vllm_mtp.data.unseen import choice_in_words, unseen_prompts
        from vllm_mtp.drafter.checkpoint import read_config
        from vllm_mtp.drafter.served import require_served
        from vllm_mtp.drafter.target_facts import TargetFacts
        from vllm_mtp.evaluation.demo import DemoPlan
        from vllm_mtp.serving.resolve import resolve_drafter
        from vllm_mtp.sharing.provenance import training_prompts

        target = self.target or str(ensure_demo_target())
        facts = TargetFacts.from_folder(Path(target))
        folder = resolve_drafter(self.drafter, target, facts)
        config = read_config(folder)
        require_served(config, folder)
        known = [training_prompts(folder)]
        prompts = unseen_prompts(self.num_prompts, known)
        if not 0 < self.num_prompts <= len(prompts):
            raise MTPError(
                f"--num-prompts: got {self.num_prompts}, expected 1 to {len(prompts)}: "
                f"so many ShareGPT prompts has the drafter {folder.name!r} not been "
                "trained on"
            )
        spec: dict[str, object] = {"method": "mtp_placeholder"}
        if self.drafter:
            spec["model"] = self.drafter
        return DemoPlan(
            target=target,
            speculative_config=spec,
            drafter=folder.name if self.drafter else f"{folder.name}, found by target",
            num_drafts=config.num_speculative_tokens,
            question=self.question,
            prompts=prompts,
            choice=choice_in_words(known),
            max_tokens=self.max_tokens,
            rounds=self.rounds,
            at_once=self.concurrency,
            dtype=self.dtype or fastest_dtype(),
        )

    def _write_page(self, path: Path, plan: "DemoPlan", result: "DemoResult") -> None:
        from vllm_mtp.engine import vllm_version
        from vllm_mtp.evaluation.answer_page import answer_page
        from vllm_mtp.files import write_whole

        versions = {name: version(name) for name in ("vllm-mtp", "torch")}
        command = shlex.join(["vllm-mtp", *sys.argv[1:]])
        page = answer_page(
            result.answer,
            rows(plan, result),
            command,
            {"vLLM": vllm_version(), **versions},
        )
        write_whole(path, page)
        print(f"\nwritten: {path}")

    def _exit_code(self, result: "DemoResult") -> int:
        long_enough = result.counts.acceptance_length > self.min_acceptance_length
        if not long_enough:
            print(f"FAILED: acceptance length not above {self.min_acceptance_length}")
        if not result.is_exact:
            print("FAILED: texts differ from the target's")
        return 0 if result.is_exact and long_enough else 1


def report(plan: "DemoPlan", result: "DemoResult") -> str:
    """The table that the demo prints."""
    lines = (f"  {name:<20} {text}" for name, text in rows(plan, result).items())
    table = "\n".join(lines)
    return f"{table}\n\n{_TIE_NOTE}" if result.fast.count("tie") else table


def rows(plan: "DemoPlan", result: "DemoResult") -> dict[str, str]:
    """What was measured, by name."""
    counts = result.counts
    found = {
        "target": Path(plan.target).name,
        "drafter": f"{plan.drafter}; up to {plan.num_drafts} tokens per draft",
    }
    by_type: dict[str, list[Comparison]] = {}
    for texts in (result.exact, result.fast):
        by_type.setdefault(texts.dtype, []).extend(texts.comparisons)
    for dtype, compared in by_type.items():
        found[f"texts in {dtype}"] = _texts(compared)
    loads = {
        "one request" if speed.at_once == 1 else f"{speed.at_once} at once": speed
        for speed in result.speeds
    }
    for name, speed in loads.items():
        found[f"speed, {name}"] = _speed(speed)
    steps = (f"{speed.tokens_per_step:.2f} with {n}" for n, speed in loads.items())
    return found | {
        "tokens per step": f"{', '.join(steps)}; the target alone gives 1",
        "acceptance length": (
            f"{counts.acceptance_length:.2f} ({counts.drafts:,} drafts; steps without "
            "one do not count)"
        ),
        "drafter's KV cache": (
            f"{result.drafter_kv_bytes:,.0f} bytes per token "
            f"({result.plain_cache.bytes_per_token:,.0f} without it, "
            f"{result.drafted_cache.bytes_per_token:,.0f} with it)"
        ),
        "prompts": f"{len(plan.prompts)} {plan.choice}",
    }


def _texts(compared: Sequence["Comparison"]) -> str:
    verdicts = [item.verdict for item in compared]
    equal, ties = verdicts.count("equal"), verdicts.count("tie")
    text = f"{equal + ties} of {len(compared)} answers are the target's"
    return f"{text}, {ties} of them up to a tie" if ties else f"{text}, token by token"


def _speed(speed: "Speed") -> str:
    return (
        f"{speed.ratio:.2f} times the target alone ({speed.ratios[0]:.2f} to "
        f"{speed.ratios[-1]:.2f}): {median(speed.drafted):.1f} tokens/s, alone "
        f"{median(speed.plain):.1f}"
    )
