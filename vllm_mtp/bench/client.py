# SPDX-License-Identifier: Apache-2.0
"""Load on a server, by vLLM's own benchmark client (``vllm bench serve``)."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_mtp.engine import bench_serve
from vllm_mtp.errors import MTPError


@dataclass(frozen=True)
class LoadResult:
    """What one load took.

    Attributes:
        tokens_per_s: Output tokens of all requests, per second of the whole load.
        output_tokens: Of all requests.
        seconds: Of the whole load.
        ttft_ms: Median time to the first token of a request.
        tpot_ms: Median time per output token of a request, after its first.
        texts: The answers, in the prompts' order.
    """

    tokens_per_s: float
    output_tokens: int
    seconds: float
    ttft_ms: float
    tpot_ms: float
    texts: tuple[str, ...]


def run_load(
    url: str,
    model: str,
    prompts: Sequence[str],
    concurrency: int,
    output_tokens: int,
    *,
    chat_template: bool = True,
    extra_body: Mapping[str, Any] | None = None,
) -> LoadResult:
    """Send all prompts, greedy, so many at a time, and wait for the answers.

    Args:
        url: The server's, without /v1.
        model: The target's folder, also for its chat template.
        prompts: User messages.
        concurrency: Requests in flight at once.
        output_tokens: Longest answer.
        chat_template: Apply the target's; the client fails where there is none.
        extra_body: Added to each request.

    Raises:
        MTPError: A request failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "prompts.jsonl")
        lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
        data.write_text("\n".join(lines) + "\n", "utf-8")
        found = bench_serve(
            *("--backend", "vllm", "--base-url", url, "--model", model),
            *("--dataset-name", "custom", "--dataset-path", str(data)),
            *("--custom-output-len", str(output_tokens), "--disable-shuffle"),
            *("--num-prompts", str(len(prompts)), "--temperature", "0"),
            *("--max-concurrency", str(concurrency), "--disable-tqdm"),
            *("--save-result", "--save-detailed", "--result-dir", folder),
            *(() if chat_template else ("--skip-chat-template",)),
            *(("--extra-body", json.dumps(extra_body)) if extra_body else ()),
        )
    if errors := [error for error in found["errors"] if error]:
        raise MTPError(f"{url}: {len(errors)} requests failed, first: {errors[0]}")
    return LoadResult(
        tokens_per_s=found["output_throughput"],
        output_tokens=found["total_output_tokens"],
        seconds=found["duration"],
        ttft_ms=found["median_ttft_ms"],
        tpot_ms=found["median_tpot_ms"],
        texts=tuple(found["generated_texts"]),
    )
