# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp demo``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_mtp.flags import flag

if TYPE_CHECKING:
    from vllm_mtp.evaluation.demo import DemoPlan, DemoResult

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
    min_acceptance_length: float = flag("limit for exit code 0", 1.9)

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
        from vllm_mtp.data.sharegpt import sharegpt_prompts
        from vllm_mtp.evaluation.demo import DemoPlan

        spec: dict[str, object] = {"method": "mtp_placeholder"}
        if self.drafter:
            spec["model"] = self.drafter
        return DemoPlan(
            target=self.target or str(ensure_demo_target()),
            speculative_config=spec,
            prompts=sharegpt_prompts(self.num_prompts),
            max_tokens=self.max_tokens,
            rounds=self.rounds,
            concurrency=self.concurrency,
        )


def report(plan: "DemoPlan", result: "DemoResult") -> str:
    """The table that the demo ends with."""
    counts = result.drafted.counts
    positions = " ".join(f"{rate:.3f}" for rate in counts.acceptance_per_position)
    rows = [
        ("target", plan.target),
        ("drafter", plan.speculative_config.get("model", "found by the target")),
        (
            "prompts",
            (
                f"{len(plan.prompts)} real ones (ShareGPT), up to {plan.max_tokens} "
                f"tokens each, {plan.concurrency} at once, {plan.rounds} rounds"
            ),
        ),
        (
            "outputs equal",
            (
                f"{result.count('equal')} of {len(plan.prompts)}, and "
                f"{result.count('tie')} part at a float tie; "
                f"{result.count('different')} different"
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
        ("drafter's KV cache", "0 bytes per token"),
        (
            "KV pool",
            (
                f"{result.plain.kv_blocks} blocks without, "
                f"{result.drafted.kv_blocks} with "
                f"(of {result.plain.kv_block_tokens} tokens)"
            ),
        ),
        (
            "tokens/s",
            (
                f"{_spread(result.plain.tokens_per_s)} without, "
                f"{_spread(result.drafted.tokens_per_s)} with"
            ),
        ),
        ("speed ratio", f"{result.speed_ratio:.2f} (median of the rounds)"),
    ]
    table = "\n".join(f"  {name:<19} {value}" for name, value in rows)
    return f"\n{table}\n\n{_SPEED_NOTE}"


def _spread(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.1f}" if len(values) == 1 else f"{low:.1f} to {high:.1f}"
