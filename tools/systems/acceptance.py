# SPDX-License-Identifier: Apache-2.0
"""How many drafts are accepted: in vLLM, and in plain torch."""

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from tools.command import alone
from tools.systems.reference import SETS, Reference
from tools.systems.runs import Run, Trained, of_each
from vllm_mtp import engine
from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.checkpoint import load_drafter
from vllm_mtp.evaluation.model_len import model_len_as_served
from vllm_mtp.evaluation.offline import CategoryResult, evaluate_rows
from vllm_mtp.metrics import AcceptanceCounts, mean_length, read_vllm_counters
from vllm_mtp.plugin import METHOD
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.load import load_frozen


def evaluate(runs: Iterable[Run], target: str, reference: Reference) -> None:
    """Count accepted drafts of every run that has not been looked at.

    Args:
        runs: Trained ones.
        target: The target's folder.
        reference: Its own answers.
    """
    # One for all of them: loading it takes as long as an evaluation.
    host = cache(lambda: HFTarget(load_frozen(target, reference.dtype, "cpu")))

    def measure(run: Run) -> None:
        known = run.results()
        if "offline" not in known:
            run.keep("offline", offline(run, host(), reference))
            print(f"{run.name}: evaluated in plain torch", flush=True)
        if "served" not in known and run.is_served:
            run.keep("served", alone(served, run, target, reference))
            print(f"{run.name}: evaluated in vLLM", flush=True)

    of_each(runs, measure)


def offline(run: Trained, host: HFTarget, reference: Reference) -> dict[str, Any]:
    """Simulated decoding behind the target's own answers.

    Returns:
        ``sets``: by set of prompts the acceptance lengths by number of drafted tokens,
        the acceptance by position, and the teacher-forced length; ``rows``: accepted
        tokens and drafts of each prompt, with all tokens drafted.
    """
    drafter = load_drafter(run.folder, dtype=host.model.dtype, device=host.device)
    k = run.config.num_speculative_tokens
    bound = BoundDrafter(drafter, host)
    sums = {name: CategoryResult.nothing(k) for name in SETS}
    rows = []
    for name, found in evaluate_rows(bound, reference.rows, k):
        sums[name] += found
        whole = found.simulated
        rows.append([name, whole.accepted_tokens, whole.drafts])
    return {
        "sets": {
            name: _figures(found.simulated)
            | {
                "acceptance_length_by_k": [
                    mean_length(counts) for counts in found.simulated_by_k
                ],
                "teacher_forced_length": found.teacher_forced_length,
            }
            for name, found in sums.items()
        },
        "rows": rows,
    }


def _figures(counts: AcceptanceCounts) -> dict[str, Any]:
    return {
        "acceptance_length": mean_length(counts),
        "acceptance_per_position": list(counts.acceptance_per_position),
        "drafts": counts.drafts,
    }


def served(run: Run, target: str, reference: Reference) -> dict[str, Any]:
    """vLLM's answers with all tokens drafted: for a process of its own.

    Returns:
        ``sets``: as `offline`, by vLLM's own counters; ``answers``: how many are the
        target's, tie with them, or differ.
    """
    sets: dict[str, dict[str, Any]] = {}
    verdicts: Counter[str] = Counter()
    with engine.start(
        target,
        dtype=reference.dtype,
        max_model_len=model_len_as_served(target, reference.max_model_len),
        disable_log_stats=False,
        speculative_config={
            "method": METHOD,
            "model": str(run.folder),
            "num_speculative_tokens": run.config.num_speculative_tokens,
        },
    ) as llm:
        for name in SETS:
            indices = [
                i for i, row in enumerate(reference.rows) if row["category"] == name
            ]
            before = read_vllm_counters(llm.get_metrics())
            answers = _answers(llm, [reference.rows[index] for index in indices])
            sets[name] = _figures(read_vllm_counters(llm.get_metrics()) - before)
            verdicts.update(
                reference.compare(index, answer).verdict
                for index, answer in zip(indices, answers, strict=True)
            )
    return {"sets": sets, "answers": dict(verdicts)}


def _answers(llm: Any, rows: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    prompts, params = [], []
    for row in rows:
        ((start, end),) = row["loss_spans"]
        prompts.append({"prompt_token_ids": row["input_ids"][:start]})
        params.append(engine.sampling(max_tokens=end - start, detokenize=False))
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
