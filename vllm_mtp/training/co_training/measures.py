# SPDX-License-Identifier: Apache-2.0
"""What a drafter that is trained beside its target is worth, position by position."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_mtp.drafter.heads import pick_greedy_with_scores
from vllm_mtp.drafter.layout import IGNORE_LABEL
from vllm_mtp.metrics import AcceptanceCounts, count_accepted, mean_length
from vllm_mtp.torch_host.texts import TextBlocks, draft_texts
from vllm_mtp.training.loss_module import LossModule

_DRAFTS, _ACCEPTED, _LABELS, _LOSS, _ENTROPY = range(5)


@torch.no_grad()
def measure(
    loss_module: LossModule, texts: Sequence[Mapping[str, Any]], step: int
) -> torch.Tensor:
    """Draft behind known text, at the blocks of a training step.

    Blocks that the end of a text cuts short are left out: what comes behind it is not
    known, so it would count as rejected.

    Args:
        loss_module: With the drafter.
        texts: As `LossModule` takes them.
        step: The optimizer's step, which decides where the blocks stand.

    Returns:
        Sums over the blocks for each position, ``[5, k]`` float64, to be added up over
        steps and processes and read by `named`: drafts; those right up to there; labels
        that the drafter could draft; their cross-entropy; the entropy of the drafts.
    """
    # One text at a time: the scores of all would take more room than the loss does.
    # Noise is what the drafter keeps, as when it serves.
    blocks = (loss_module.blocks(text, step) for text in texts)
    sums = [_of_text(loss_module, text._replace(noise_ids=None)) for text in blocks]
    return torch.stack(sums).sum(0)


def _of_text(loss_module: LossModule, text: TextBlocks) -> torch.Tensor:
    num_draft_tokens = loss_module.num_draft_tokens
    labels = text.labels(num_draft_tokens)
    whole = (labels != IGNORE_LABEL).all(1)
    sums = torch.zeros(5, num_draft_tokens, dtype=torch.float64, device=labels.device)
    if not whole.any():
        return sums
    drafted, scores = draft_texts(
        loss_module.bound, [text], num_draft_tokens, pick_greedy_with_scores
    )
    assert scores is not None, "the pick gives them"
    drafted, scores, labels = drafted[whole], scores[whole], labels[whole]
    counts = count_accepted(drafted, labels)
    columns = labels
    if loss_module.token_loss.candidates is not None:
        columns = loss_module.token_loss.candidates.columns(labels)
    log_q = scores.float().log_softmax(-1)
    chosen = log_q.gather(-1, columns.clamp(min=0)[..., None])[..., 0]
    can_draft = columns != IGNORE_LABEL
    sums[_DRAFTS] = counts.drafts
    sums[_ACCEPTED] = torch.tensor(counts.accepted_per_position).to(sums)
    sums[_LABELS] = can_draft.sum(0)
    sums[_LOSS] = -chosen.masked_fill(~can_draft, 0.0).sum(0)
    sums[_ENTROPY] = -(log_q.exp() * log_q).sum(-1).sum(0)
    return sums


def named(sums: torch.Tensor) -> dict[str, float]:
    """The means by name; nothing where nothing was measured.

    Args:
        sums: From `measure`.
    """
    drafts = int(sums[_DRAFTS, 0])
    if not drafts:
        return {}
    accepted = tuple(map(int, sums[_ACCEPTED].tolist()))
    counts = AcceptanceCounts(drafts, drafts * len(accepted), accepted)
    means = {
        "teacher_forced": counts.acceptance_per_position,
        "loss": (sums[_LOSS] / sums[_LABELS].clamp(min=1)).tolist(),
        "entropy": (sums[_ENTROPY] / drafts).tolist(),
    }
    positions = {
        f"{name}_position_{number}": value
        for name, values in means.items()
        for number, value in enumerate(values, 1)
    }
    return {"teacher_forced_length": mean_length(counts), **positions}
