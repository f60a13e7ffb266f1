# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp demo``."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_mtp.errors import MTPError
from vllm_mtp.flags import flag

if TYPE_CHECKING:
    from vllm_mtp.evaluation.demo import DemoPlan, DemoResult
    from vllm_mtp.evaluation.kv_cache import KVCache

_TIE_NOTE = """\
A float tie: in bfloat16 the two tokens' logits are at most two rounding steps apart, so
either is the target's. Behind it the texts go on apart, and are not compared."""
_SPEED_NOTE = """\
The ratio is this machine's. Verifying several tokens at once is nearly free where
decoding waits for memory (a GPU at small batches); on a few CPU cores it costs almost
as much as decoding them one by one, so fewer target steps save little time there."""


@dataclass
class Demo:
    """Serve real prompts (ShareGPT) with stock vLLM, without and with the method, in
    turns, and print what was measured. Exit code 0 only if the outputs are the
    target's and the acceptance length is above the limit."""

    target: str | None = flag("the target's folder (default: the demo target)", None)
    drafter: str | None = flag("the drafter's folder (default: found by target)", None)
    num_prompts: int = flag("how many prompts", 12)
    max_tokens: int = flag("longest answer, in tokens", 64)
    rounds: int = flag("how often each side answers all prompts", 2)
    concurrency: int = flag("requests decoded at once", 4)
    min_acceptance_length: float = flag("limit for exit code 0", 1.7)

    def run(self) -> int:
        from tqdm import tqdm

        from vllm_mtp.evaluation.demo import num_steps, run_demo

        plan = self._plan()
        with tqdm(total=num_steps(plan), unit="step") as bar:

            def progress(text: str) -> None:
                bar.set_description(f"{text:<36}")
                bar.update()

            result = run_demo(plan, progress)
        print(report(plan, result))
        good = result.count("different") == 0
        long_enough = (
            result.drafted.counts.acceptance_length > self.min_acceptance_length
        )
        if not long_enough:
            print(f"FAILED: acceptance length not above {self.min_acceptance_length}")
        if not good:
            print("FAILED: outputs differ from the target's")
        return 0 if good and long_enough else 1

    def _plan(self) -> "DemoPlan":
        from vllm_mtp.data.demo_target import ensure_demo_target
        from vllm_mtp.data.unseen import choice_in_words, unseen_prompts
        from vllm_mtp.drafter.target_facts import TargetFacts
        from vllm_mtp.evaluation.demo import DemoPlan
        from vllm_mtp.serving.resolve import resolve_drafter
        from vllm_mtp.sharing.provenance import training_prompts

        target = self.target or str(ensure_demo_target())
        facts = TargetFacts.from_folder(Path(target))
        folder = resolve_drafter(self.drafter, target, facts)
        known = [training_prompts(folder)]
        prompts = unseen_prompts(self.num_prompts, known)
        if len(prompts) < self.num_prompts:
            raise MTPError(
                f"--num-prompts: got {self.num_prompts}, but ShareGPT has only "
                f"{len(prompts)} prompts that the drafter {folder.name!r} was not "
                "trained on; ask for fewer"
            )
        spec: dict[str, object] = {"method": "mtp_placeholder"}
        if self.drafter:
            spec["model"] = self.drafter
        return DemoPlan(
            target=target,
            speculative_config=spec,
            drafter=folder.name if self.drafter else f"{folder.name}, found by target",
            prompts=prompts,
            choice=choice_in_words(known),
            max_tokens=self.max_tokens,
            rounds=self.rounds,
            concurrency=self.concurrency,
        )


def report(plan: "DemoPlan", result: "DemoResult") -> str:
    """The table that the demo ends with."""
    plain, drafted, counts = result.plain, result.drafted, result.drafted.counts
    equal, ties = result.count("equal"), result.count("tie")
    positions = " ".join(f"{rate:.3f}" for rate in counts.acceptance_per_position)
    rows = [
        ("target", plan.target),
        ("drafter", plan.drafter),
        ("prompts", f"{len(plan.prompts)} {plan.choice}"),
        (
            "answers",
            (
                f"up to {plan.max_tokens} tokens each, {plan.concurrency} at once, "
                f"{plan.rounds} rounds"
            ),
        ),
        (
            "the target's text",
            (
                f"{equal + ties} of {len(plan.prompts)} answers: {equal} to the end, "
                f"{ties} up to a float tie; {result.count('different')} differ"
            ),
        ),
        (
            "acceptance length",
            (
                f"{counts.acceptance_length:.3f} tokens per target step "
                f"(bonus token included, {counts.drafts} drafts)"
            ),
        ),
        ("accepted by position", positions),
        (
            "drafter's KV cache",
            (
                f"{result.drafter_kv_bytes:,.0f} bytes per token: "
                f"{_cache(plain.kv_cache)} without, {_cache(drafted.kv_cache)} with"
            ),
        ),
        (
            "KV pool",
            (
                f"{plain.kv_blocks} blocks without, {drafted.kv_blocks} with "
                f"(of {plain.kv_block_tokens} tokens)"
            ),
        ),
        (
            "tokens/s",
            (
                f"{_spread(plain.tokens_per_s)} without, "
                f"{_spread(drafted.tokens_per_s)} with"
            ),
        ),
        ("speed ratio", f"{result.speed_ratio:.2f} (median of the rounds)"),
    ]
    table = "\n".join(f"  {name:<20} {value}" for name, value in rows)
    notes = [*([_TIE_NOTE] if ties else []), _SPEED_NOTE]
    return "\n\n".join([f"\n{table}", *notes])


def _cache(cache: "KVCache") -> str:
    return f"{cache.bytes_per_token:,.0f} in {cache.layers} layers"


def _spread(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.1f}" if len(values) == 1 else f"{low:.1f} to {high:.1f}"
