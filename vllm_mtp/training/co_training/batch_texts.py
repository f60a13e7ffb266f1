# SPDX-License-Identifier: Apache-2.0
"""The texts in a batch of another trainer, and what its model learns to write there.

Known are the batches of transformers' and TRL's trainers of causal language models:
rows with labels (SFT), several texts in one row without padding, and prompts with the
model's own completions (GRPO).
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from vllm_mtp.drafter.layout import IGNORE_LABEL, possible_anchors
from vllm_mtp.training.states import TrainingInputError


def texts_of(
    inputs: Mapping[str, Any], max_tokens: int, first: int = 0
) -> list[dict[str, Any]]:
    """Take a batch apart.

    Args:
        inputs: What the trainer's ``compute_loss`` gets. Either ``input_ids``
            ``[B, T]`` with ``labels`` ``[B, T]`` and ``attention_mask`` ``[B, T]``, or
            without the mask and with ``position_ids`` ``[B, T]``, which begin at 0 with
            each text of a row; or ``prompt_ids`` and ``prompt_mask`` ``[B, P]`` with
            ``completion_ids`` and ``completion_mask`` ``[B, C]``.
        max_tokens: Longer texts are cut here.
        first: Number of the first text.

    Returns:
        The texts that a drafter can learn from, as `LossModule` takes them. Padding is
        gone, and ``loss_spans`` are the tokens that the model learns to write.

    Raises:
        TrainingInputError: It is no such batch.
    """
    for name in inputs:
        if name.startswith(_NO_TEXT):
            raise TrainingInputError(
                f"co_train: the batch has {name!r}, so its texts hold images or "
                "sounds, which drafters are not trained on; use data of text alone"
            )
    rows = _completions(inputs) if "completion_ids" in inputs else _labelled(inputs)
    texts: list[dict[str, Any]] = []
    for token_ids, wanted in rows:
        token_ids, spans = token_ids[:max_tokens], _spans(wanted[:max_tokens])
        if len(possible_anchors(spans, len(token_ids))):
            number = first + len(texts)
            texts.append({"index": number, "input_ids": token_ids, "loss_spans": spans})
    return texts


# Images, their sizes, and sounds.
_NO_TEXT = ("pixel_", "image_", "num_images", "audio", "input_features")
_Row = tuple[torch.Tensor, torch.Tensor]
"""A text's tokens ``[T]`` int64, and which of them are learnt, ``[T]`` bool."""


def _completions(inputs: Mapping[str, Any]) -> Iterator[_Row]:
    learnt = inputs["completion_mask"].bool()
    prompts = zip(inputs["prompt_ids"], inputs["prompt_mask"].bool(), strict=True)
    # What a tool has answered is in a completion, but nothing that the model says.
    own = learnt & inputs["tool_mask"].bool() if "tool_mask" in inputs else learnt
    answers = zip(inputs["completion_ids"], learnt, own, strict=True)
    for (prompt, is_prompt), (answer, is_answer, is_own) in zip(
        prompts, answers, strict=True
    ):
        before = prompt[is_prompt]
        nothing = torch.zeros_like(before, dtype=torch.bool)
        yield (
            torch.cat([before, answer[is_answer]]),
            torch.cat([nothing, is_own[is_answer]]),
        )


def _labelled(inputs: Mapping[str, Any]) -> Iterator[_Row]:
    if missing := {"input_ids", "labels"} - set(inputs):
        raise TrainingInputError(
            f"co_train: the batch has {sorted(inputs)}, and no {sorted(missing)}; "
            "expected input_ids with labels, as of SFTTrainer, or prompt_ids with "
            "completion_ids, as of GRPOTrainer"
        )
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and mask.ndim == 2:
        for ids, labels, real in zip(
            inputs["input_ids"], inputs["labels"], mask.bool(), strict=True
        ):
            yield ids[real], labels[real] != IGNORE_LABEL
    elif mask is None and positions is not None and positions.ndim == 2:
        for ids, labels, places in zip(
            inputs["input_ids"], inputs["labels"], positions, strict=True
        ):
            begins = {0, len(ids), *(places == 0).nonzero().flatten().tolist()}
            sizes = [b - a for a, b in pairwise(sorted(begins))]
            wanted = labels != IGNORE_LABEL
            yield from zip(ids.split(sizes), wanted.split(sizes), strict=True)
    else:
        raise TrainingInputError(
            "co_train: nothing in the batch tells its texts from padding; expected an "
            "attention_mask [B, T], or position_ids [B, T] without one (padding-free)"
        )


def _spans(wanted: torch.Tensor) -> Sequence[Sequence[int]]:
    """Runs of True in ``[T]`` bool, as ``[start, end)``."""
    edges = F.pad(wanted.int(), (1, 1)).diff()
    starts, ends = ((edges == step).nonzero().flatten().tolist() for step in (1, -1))
    return list(zip(starts, ends, strict=True))
