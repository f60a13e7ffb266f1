# SPDX-License-Identifier: Apache-2.0
"""Where greedy decoding would draft behind a known text.

Decoding drafts again where its last draft ended, and so most often behind the tokens
that are hard for this drafter, while a block behind every token sees all of them alike.

Dimensions: B blocks, k positions.
"""

from collections.abc import Sequence

import torch

from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.heads import pick_greedy
from vllm_mtp.metrics import leading
from vllm_mtp.torch_host.texts import TextBlocks, draft_texts
from vllm_mtp.training.token_loss import blocks_at_once


@torch.no_grad()
def draft_greedily(
    bound: BoundDrafter,
    texts: Sequence[TextBlocks],
    hidden: torch.Tensor | None,
    k: int,
) -> torch.Tensor:
    """What the drafter drafts behind every anchor, as in decoding.

    Args:
        bound: The drafter.
        texts: The blocks' texts.
        hidden: ``[B, k, hidden_size]``, what its forward gave. Of a chain it is not
            read: its rows depend on what is drafted, so it runs once more.
        k: Positions.

    Returns:
        ``[B, k]`` int64 tokens.
    """
    config = bound.drafter.config
    if hidden is None or config.chain is not None:
        # One text at a time: their logits are scored at once.
        of_texts = [draft_texts(bound, [text], k, pick_greedy) for text in texts]
        return torch.cat([drafted for drafted, _ in of_texts])
    at_once = blocks_at_once(config.num_draftable_tokens, k, hidden.device)
    parts = hidden.detach().split(at_once)
    return torch.cat([bound.draft(part, pick_greedy)[0] for part in parts])


def visited(
    texts: Sequence[TextBlocks], drafted: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Which blocks greedy decoding runs, if it says the text.

    Of anchors that follow each other it runs the first one. Where the first a drafts of
    a block are right, it goes on a + 1 tokens behind its anchor.

    Args:
        texts: The blocks' texts; their anchors ascend.
        drafted: ``[B, k]`` int64, tokens behind the anchors.
        labels: ``[B, k]`` int64, the texts' own, which end with the answer.

    Returns:
        ``[B]`` bool.
    """
    starts = torch.cat([_starts(text) for text in texts])
    size = len(starts)
    index = torch.arange(size, device=starts.device)
    after = index.where(starts, size).flip(0).cummin(0).values.flip(0).roll(-1)
    after[-1] = size
    # Behind the last anchor in a row the walk is out of sight: there is one block more.
    accepted = leading(drafted, labels).sum(dim=1)
    goes_on = index + 1 + accepted
    goes_on = goes_on.where(goes_on < after, size)
    jump = torch.cat([goes_on, goes_on.new_full((1,), size)])
    seen = torch.cat([starts, starts.new_zeros(1)]).long()
    # After n rounds all is seen that is less than 2 ** n jumps away, on any device
    # without a look at the numbers.
    for _ in range(size.bit_length()):
        seen = (seen + torch.zeros_like(seen).index_add(0, jump, seen)).clamp(max=1)
        jump = jump[jump]
    return seen[:size].bool()


def _starts(text: TextBlocks) -> torch.Tensor:
    """Which anchors ``[B]`` do not stand right behind another one."""
    behind = text.prefix_lens.diff() == 1
    return torch.cat([behind.new_ones(1), ~behind])
