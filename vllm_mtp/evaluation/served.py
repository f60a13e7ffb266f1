# SPDX-License-Identifier: Apache-2.0
"""Acceptance of a drafter in vLLM itself, counted by vLLM."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_mtp import engine
from vllm_mtp.evaluation.model_len import model_len_as_served
from vllm_mtp.metrics import AcceptanceCounts, read_vllm_counters
from vllm_mtp.plugin import METHOD


@dataclass(frozen=True)
class ServedResult:
    """What vLLM counted.

    Attributes:
        by_category: In the order of their names.
        same_text: Answers that are, token by token, those of the data.
        sequences: Number of answers.
    """

    by_category: dict[str, AcceptanceCounts]
    same_text: int
    sequences: int

    @property
    def total(self) -> AcceptanceCounts:
        """All categories together."""
        return sum(self.by_category.values(), AcceptanceCounts(0, 0, ()))


def measure_served(
    drafter: Path | str,
    target: Path | str,
    rows: Iterable[Mapping[str, Any]],
    k: int,
    dtype: str = "auto",
    penalties: Mapping[str, Any] | None = None,
) -> ServedResult:
    """Let vLLM answer the prompts of a data set again, greedily, with the drafter.

    Args:
        drafter: The drafter's folder.
        target: The target's folder.
        rows: With the columns of `vllm_mtp.data.store`; the first loss span is the
            answer, what stands before it the prompt.
        k: Tokens to draft per step.
        dtype: Of the target.
        penalties: Of the data set's answers; greedy decoding has them too.
    """
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["category"]].append(row)
    longest = max(len(r["input_ids"]) for group in groups.values() for r in group)
    with engine.start(
        target,
        cache_gib=2,
        dtype=dtype,
        # Room for the last drafts, so that every step drafts k tokens.
        max_model_len=model_len_as_served(target, longest + 1 + k),
        disable_log_stats=False,
        skip_tokenizer_init=not Path(target, "tokenizer.json").exists(),
        speculative_config={
            "method": METHOD,
            "model": str(drafter),
            "num_speculative_tokens": k,
        },
    ) as llm:
        counted = {
            name: _answer(llm, rows, penalties or {})
            for name, rows in sorted(groups.items())
        }
    return ServedResult(
        {name: counts for name, (counts, _) in counted.items()},
        sum(same for _, same in counted.values()),
        sum(map(len, groups.values())),
    )


def _answer(
    llm: Any, rows: list[Mapping[str, Any]], penalties: Mapping[str, Any]
) -> tuple[AcceptanceCounts, int]:
    """Counts of these rows, and how many answers are the data's."""
    spans = [row["loss_spans"][0] for row in rows]
    prompts = [
        {"prompt_token_ids": list(row["input_ids"][:start])}
        for row, (start, _) in zip(rows, spans, strict=True)
    ]
    params = [
        engine.sampling(max_tokens=end - start, detokenize=False, **penalties)
        for start, end in spans
    ]
    before = read_vllm_counters(llm.get_metrics())
    outputs = llm.generate(prompts, params, use_tqdm=False)
    counts = read_vllm_counters(llm.get_metrics()) - before
    same = sum(
        list(output.outputs[0].token_ids) == list(row["input_ids"][start:end])
        for output, row, (start, end) in zip(outputs, rows, spans, strict=True)
    )
    return counts, same
