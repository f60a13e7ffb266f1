# SPDX-License-Identifier: Apache-2.0
"""The torch drafter and the served drafter are one drafter: the same tokens give
the same logits, for every kind of layer list."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from tests.serving.conftest import DRAFTERS, SHAPES
from tests.serving.engines import ON_V2, bound_drafter_of, engine, generate
from vllm_mtp.drafter.bound import BoundDrafter, Traced
from vllm_mtp.drafter.checkpoint import load_drafter
from vllm_mtp.drafter.heads import pick_greedy
from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.texts import TextBlocks, draft_texts

pytestmark = pytest.mark.engine

MAX_ABS_DIFFERENCE = 1e-3


# Several requests of unequal length, so that mixed-up rows would show.
def prompts_of(*lengths: int) -> list[list[int]]:
    return [[(37 * i + 11 * n) % 512 for i in range(n)] for n in lengths]


PROMPTS = prompts_of(70, 33, 5)
# Behind the first, 256 tokens are skipped, behind the second 128, and behind the third
# from its eighth token on.
LONG_PROMPTS = prompts_of(470, 310, 298)


def record_steps(bound: BoundDrafter) -> list[dict[str, torch.Tensor]]:
    """Keep what every drafting step reads and gives, of blocks and of chains."""
    steps: list[dict[str, torch.Tensor]] = []
    seen: dict[int, torch.Tensor] = {}
    rows: list[torch.Tensor] = []
    logits = bound.logits

    def recorded_logits(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(logits(hidden).clone())
        return rows[-1]

    def trace(stage: int, values: torch.Tensor) -> None:
        seen[stage] = values.clone()
        if stage == Traced.DRAFTS:  # the last of a step
            steps.append(
                {
                    "anchors": seen.pop(Traced.ANCHORS, torch.empty(0)),
                    "positions": seen.pop(Traced.POSITIONS, torch.empty(0)),
                    "tokens": seen[Traced.DRAFTS],
                    "logits": torch.cat(rows, dim=1),
                }
            )
            rows.clear()

    bound.logits, bound.trace = recorded_logits, trace  # type: ignore[method-assign]
    return steps


NAMES = ["shared-1", "shared-4", "own-1", "own-some", "mixed", "windowed"]
NAMES.append("mixed-windowed")
PAIRS = [("llama", name) for name in (*NAMES, *SHAPES)]
# Qwen3 differs from Llama in its layers only: own ones, and all options.
PAIRS += [("qwen3", "own-1"), ("qwen3", "mixed-windowed")]
SLOW_PAIRS = [("qwen3", name) for name in NAMES if ("qwen3", name) not in PAIRS]
# Sliding windows, shorter than the longest prompt, alone and beside full attention.
PAIRS += [("mistral", "shared-4"), ("gemma3", "shared-4"), ("gemma3", "windowed")]
PAIRS.append(("gemma3", "chain"))
SLOW_PAIRS += [("mistral", "mixed"), ("phi3", "shared-4"), ("qwen3_moe", "shared-4")]
# Targets whose layers take and give the stream, rotate and attend in other ways.
PAIRS += [
    (family, name)
    for family in ("exaone4", "cohere2", "gpt_oss")
    for name in ("own-shared", "shared-own")
]
PAIRS.append(("phi3_longrope", "shared-4"))
if ON_V2:  # Triton's interpreter takes about 0.2 s per step
    names = ("own-some", "mixed", "mixed-windowed", *SHAPES)
    PAIRS = [("llama", name) for name in names]
    SLOW_PAIRS = [("llama", name) for name in NAMES if ("llama", name) not in PAIRS]
    PAIRS += [("gemma3", "windowed"), ("gemma3", "chain")]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *PAIRS,
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW_PAIRS),
    ],
)
def test_same_tokens_same_logits(
    name: str,
    family: str,
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
) -> None:
    folder = tiny_drafter(family, name)
    spec = {"method": "mtp_placeholder", "model": str(folder)}
    prompts = LONG_PROMPTS if DRAFTERS[name][2].prefix_window else PROMPTS
    with engine(tiny_targets[family], spec, max_model_len=512) as llm:
        steps = record_steps(bound_drafter_of(llm))
        outputs = generate(llm, prompts, 12).token_ids

    model = AutoModelForCausalLM.from_pretrained(tiny_targets[family]).eval()
    torch_drafter = BoundDrafter(load_drafter(folder), HFTarget(model))
    torch_steps = record_steps(torch_drafter)
    texts = [torch.tensor(p + o) for p, o in zip(prompts, outputs, strict=True)]
    compared = 0
    for step in steps:
        for row, positions in enumerate(step["positions"]):
            prefix_len = int(positions[0])
            text = text_of(texts, prefix_len, int(step["anchors"][row]))
            if text is None:
                continue  # behind the last token, or a prompt that goes on
            run_torch_step(torch_drafter, text, prefix_len, len(positions))
            expected = torch_steps.pop()
            difference = (step["logits"][row] - expected["logits"][0]).abs().max()
            assert difference <= MAX_ABS_DIFFERENCE
            assert step["tokens"][row].tolist() == expected["tokens"][0].tolist()
            compared += 1
    assert compared >= 12


def text_of(
    texts: list[torch.Tensor], prefix_len: int, anchor: int
) -> torch.Tensor | None:
    """The text whose token at ``prefix_len`` is the anchor; lengths tell them apart."""
    for text in texts:
        if len(text) - 12 <= prefix_len < len(text) and text[prefix_len] == anchor:
            return text
    return None


@torch.no_grad()
def run_torch_step(
    drafter: BoundDrafter, tokens: torch.Tensor, prefix_len: int, num_draft_tokens: int
) -> None:
    """Draft greedily in plain torch."""
    target = drafter.target
    assert isinstance(target, HFTarget)
    lens = torch.tensor([prefix_len])
    text = TextBlocks(tokens, target.encode(tokens[: prefix_len + 1]), lens)
    draft_texts(drafter, [text], num_draft_tokens, pick_greedy)


def test_rows_that_read_ahead_need_a_backend_that_can(
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tiny_drafter("llama", "bidirectional")
    spec = {"method": "mtp_placeholder", "model": str(folder)}
    monkeypatch.setattr(CPUAttentionBackend, "supports_non_causal", lambda: False)
    message = "block_mask: got 'bidirectional', .* CPU_ATTN is causal only. .*another"
    with (
        pytest.raises(UnsupportedTargetError, match=message) as error,
        engine(tiny_targets["llama"], spec),
    ):
        pass
    assert "\n" not in str(error.value)
