# SPDX-License-Identifier: Apache-2.0
"""The target's own answers to the prompts that systems are evaluated on.

They are asked for once, in the type that all is measured in, so that an answer with
drafts can be compared token by token. Where it differs, the likeliest tokens beside
tell whether two of them tied.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tools.command import alone
from tools.systems.presets import ROOT
from vllm_mtp import engine
from vllm_mtp.data.render import Renderer
from vllm_mtp.data.store import HELD_OUT, read_split
from vllm_mtp.errors import MTPError
from vllm_mtp.evaluation.equality import BF16_TIE_MARGIN, Comparison, compare_greedy
from vllm_mtp.evaluation.model_len import model_len_as_served
from vllm_mtp.files import write_whole

UNSEEN_PROMPTS = ROOT / "examples" / "prompts" / "unseen.jsonl"
HELD_OUT_SET, UNSEEN_SET = "held out", "unseen"
SETS = (HELD_OUT_SET, UNSEEN_SET)
_LIKELIEST = 5
_ROOM = 8  # for drafts behind the last token
_TIE_MARGINS = {"float32": 1e-3, "bfloat16": BF16_TIE_MARGIN}
"""In nats. Logprobs of one row and of several differ by less in float32."""


@dataclass(frozen=True)
class Reference:
    """Answers of the target alone.

    Attributes:
        dtype: Of the target.
        rows: As of `vllm_mtp.data.store`; the category is the set.
        likeliest: By row and token of its answer: logprobs by token id.
    """

    dtype: str
    rows: tuple[dict[str, Any], ...]
    likeliest: tuple[tuple[dict[int, float], ...], ...]

    def compare(self, index: int, answer: Sequence[int]) -> Comparison:
        """One answer with drafts beside that of the target alone."""
        ((start, end),) = self.rows[index]["loss_spans"]
        logprobs = [
            {token: SimpleNamespace(logprob=value) for token, value in some.items()}
            for some in self.likeliest[index]
        ]
        return compare_greedy(
            self.rows[index]["input_ids"][start:end],
            logprobs,
            answer,
            tie_margin=_TIE_MARGINS[self.dtype],
        )

    @property
    def max_model_len(self) -> int:
        """Room for every row, and for the drafts behind its last token."""
        return max(len(row["input_ids"]) for row in self.rows) + _ROOM


def reference(
    target: str, data: str, out: Path, dtype: str, prompts: int, max_tokens: int
) -> Reference:
    """The answers, from ``reference.json`` of the runs' folder, or asked for now.

    Args:
        target: The target's folder.
        data: Has the held-out prompts.
        out: Folder of the runs.
        dtype: Of the target.
        prompts: At most so many of each set.
        max_tokens: Longest answer.

    Raises:
        MTPError: The file is of other settings.
    """
    path = out / "reference.json"
    asked = {"dtype": dtype, "prompts": prompts, "max_tokens": max_tokens}
    if not path.is_file():
        rows, likeliest = alone(answer_alone, target, data, dtype, prompts, max_tokens)
        found = {"asked": asked, "rows": rows, "likeliest": likeliest}
        write_whole(path, json.dumps(found) + "\n")
    found = json.loads(path.read_text("utf-8"))
    if found["asked"] != asked:
        raise MTPError(
            f"{path}: was made with {found['asked']}, got {asked}; use these flags, or "
            "remove it and the runs' results"
        )
    likeliest = tuple(
        tuple({int(k): v for k, v in token.items()} for token in row)
        for row in found["likeliest"]
    )
    return Reference(dtype, tuple(found["rows"]), likeliest)


def answer_alone(
    target: str, data: str, dtype: str, prompts: int, max_tokens: int
) -> tuple[list[dict[str, Any]], list[list[dict[int, float]]]]:
    """Let the target answer, without drafts.

    Returns:
        Rows, and the likeliest tokens of each, as in `Reference`.
    """
    asked = _held_out(data, prompts) + _unseen(target, prompts)
    longest = max(len(ids) for _, ids in asked) + max_tokens + _ROOM
    with engine.start(
        target, dtype=dtype, max_model_len=model_len_as_served(target, longest)
    ) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for _, ids in asked],
            engine.sampling(
                max_tokens=max_tokens, logprobs=_LIKELIEST, detokenize=False
            ),
            use_tqdm=False,
        )
    rows, likeliest = [], []
    for number, ((name, ids), output) in enumerate(zip(asked, outputs, strict=True)):
        answer = output.outputs[0]
        whole = [*ids, *answer.token_ids]
        rows.append(
            {
                "prompt_id": f"{number:032x}",
                "category": name,
                "input_ids": whole,
                "loss_spans": [[len(ids), len(whole)]],
            }
        )
        likeliest.append(
            [
                {t: round(v.logprob, 6) for t, v in some.items()}
                for some in answer.logprobs
            ]
        )
    return rows, likeliest


def _held_out(data: str, prompts: int) -> list[tuple[str, list[int]]]:
    rows = read_split(data, HELD_OUT)
    return [
        (HELD_OUT_SET, row["input_ids"][: row["loss_spans"][0][0]])
        for row in rows.select(range(min(prompts, len(rows))))
    ]


def _unseen(target: str, prompts: int) -> list[tuple[str, list[int]]]:
    renderer = Renderer(engine.front_end(target))
    lines = UNSEEN_PROMPTS.read_text("utf-8").splitlines()[:prompts]
    texts: list[Mapping[str, str]] = [json.loads(line) for line in lines]
    return [(UNSEEN_SET, renderer.token_ids_of(text["prompt"])) for text in texts]
