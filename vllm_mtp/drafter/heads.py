# SPDX-License-Identifier: Apache-2.0
"""From the block's last hidden states to the drafted tokens."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from vllm_mtp.drafter.layers import Norm, each_position

Pick = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""Choose tokens from logits ``[B, V]``: token indices ``[B]`` int64, and their
distributions ``[B, V]`` where the sampler keeps them."""


class MarkovCorrection(nn.Module):
    """Low-rank bias on a position's logits from the token drafted one position before.

    ``bias = U (sigmoid(G h + b) * E[previous])``. As in DSpark (2607.05147), with
    a gate from the position's hidden state h. It costs one small product per position
    and lets the parallel positions agree with each other.
    """

    def __init__(
        self, rank: int, hidden_size: int, vocab_size: int, out_size: int
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(
            vocab_size, rank, _weight=torch.empty(vocab_size, rank)
        )
        self.gate = nn.Linear(hidden_size, rank)
        self.unembed = nn.Linear(rank, out_size, bias=False)

    def forward(
        self,
        previous: torch.Tensor,
        hidden: torch.Tensor,
        columns: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Bias for one position.

        Args:
            previous: ``[..]`` int64; token ids of the target's vocabulary.
            hidden: ``[.., hidden_size]``; the position's last hidden states.
            columns: ``[C]`` int64; only these of the output vocabulary.

        Returns:
            ``[.., V]``, V being the size of the output vocabulary, or ``[.., C]``.
        """
        return self.bias(previous, self.gates(hidden), columns)

    def gates(self, hidden: torch.Tensor) -> torch.Tensor:
        """What `forward` needs of hidden states ``[.., hidden_size]``: no token, so all
        positions at once. ``[.., rank]``."""
        return torch.sigmoid(self.gate(hidden))

    def bias(
        self,
        previous: torch.Tensor,
        gates: torch.Tensor,
        columns: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `forward`, with the position's `gates`."""
        gated = gates * self.embed(previous)
        if columns is None:
            return self.unembed(gated)
        return F.linear(gated, self.unembed.weight[columns])

    def init_weights(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.embed.weight, std=0.02, generator=generator)
        nn.init.normal_(self.gate.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.gate.bias)
        nn.init.zeros_(self.unembed.weight)


class OwnHeads(nn.Module):
    """An LM head of the drafter's own for each position of the block (Medusa).

    They give logits as they are, also where the target scales or caps its own.
    """

    def __init__(self, num_positions: int, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_positions, out_size, hidden_size))

    def forward(
        self,
        hidden: torch.Tensor,
        first: int = 0,
        columns: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of positions one after the other.

        Args:
            hidden: ``[B, positions, hidden_size]``.
            first: Which position comes first.
            columns: ``[C]`` int64; only these of the output vocabulary.

        Returns:
            ``[B, positions, V]``, or ``[B, positions, C]``.
        """
        weight: torch.Tensor = self.weight
        if hidden.shape[1] < len(weight):  # the gradient of a slice is a copy of all
            weight = weight[first : first + hidden.shape[1]]
        if columns is not None:
            weight = weight[:, columns]
        return each_position(hidden, weight)

    def init_weights(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.weight, std=0.02, generator=generator)


class ChainInput(nn.Module):
    """What enters a row of a chain: the token before it, and the last hidden state.

    ``W [norm(E(token)); norm(h)]`` as in DeepSeek-V3 (2412.19437).
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.token_norm = Norm(hidden_size, eps)
        self.hidden_norm = Norm(hidden_size, eps)
        self.fuse = nn.Linear(2 * hidden_size, hidden_size, bias=False)

    def forward(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Both ``[B, hidden_size]``, and so is what it gives."""
        both = self.token_norm(embedded), self.hidden_norm(hidden.to(embedded.dtype))
        return self.fuse(torch.cat(both, dim=-1))

    def init_weights(self, _: torch.Generator) -> None:
        """Their sum, so that layers that come as copies have something to work on."""
        nn.init.ones_(self.token_norm.weight)
        nn.init.ones_(self.hidden_norm.weight)
        with torch.no_grad():
            eye = torch.eye(self.fuse.weight.shape[0])
            self.fuse.weight.copy_(torch.cat([eye, eye], dim=1))


class DraftVocab(nn.Module):
    """A reduced output vocabulary: the target tokens that can be drafted."""

    token_ids: torch.Tensor  # shape: [V], int64, index -> target token id

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("token_ids", torch.empty(size, dtype=torch.int64))

    def to_token_ids(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices of the reduced vocabulary to the target's token ids."""
        return self.token_ids[indices]

    def spread(self, logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Logits over the reduced vocabulary to the whole one.

        Args:
            logits: ``[B, V]``.
            vocab_size: Size of the target's vocabulary.

        Returns:
            ``[B, vocab_size]``; minus infinity for tokens that cannot be drafted.
        """
        whole = logits.new_full((logits.shape[0], vocab_size), float("-inf"))
        return whole.index_copy_(-1, self.token_ids, logits)


def pick_block(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    markov: MarkovCorrection | None,
    vocab: DraftVocab | None,
    pick: Pick,
    *,
    spread_to: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Choose a block's tokens from left to right.

    The logits of all positions come from one forward; only the Markov correction
    looks at the token chosen before. The first position is never corrected: its
    previous token is the anchor, which the drafter read.

    Args:
        logits: ``[B, k, V]``, uncorrected.
        hidden: ``[B, k, hidden_size]``, what the logits were made from.
        markov: The correction, or None.
        vocab: The reduced vocabulary that V counts, or None for the target's.
        pick: The sampler, called once per position from left to right.
        spread_to: Size of the target's vocabulary, where ``pick`` must see all of
            it and not the reduced one.

    Returns:
        Token ids ``[B, k]`` int64 and, where ``pick`` gives them, the
        distributions ``[B, k, V]`` they were drawn from.
    """
    if spread_to is None or vocab is None:
        to_scores, to_tokens = _unchanged, vocab.to_token_ids if vocab else _unchanged
    else:
        to_scores, to_tokens = partial(vocab.spread, vocab_size=spread_to), _unchanged
    tokens: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    batch, num_draft_tokens = logits.shape[:2]
    gates = None
    if markov is not None and num_draft_tokens > 1:
        gates = markov.gates(hidden.flatten(0, 1)).unflatten(0, (batch, -1))
    for position in range(num_draft_tokens):
        scores = logits[:, position]
        if markov is not None and gates is not None and position > 0:
            scores = scores + markov.bias(tokens[-1], gates[:, position])
        if spread_to is not None:
            # Of a distribution that is NaN, rejection sampling makes other texts.
            scores = scores.float().nan_to_num(0.0, 1e30, -1e30)
        index, distribution = pick(to_scores(scores))
        tokens.append(to_tokens(index))
        if distribution is not None:
            kept.append(distribution)
    return torch.stack(tokens, dim=1), torch.stack(kept, dim=1) if kept else None


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def pick_greedy(logits: torch.Tensor) -> tuple[torch.Tensor, None]:
    """The best token of each row, the first of equals; no distribution is kept."""
    # `argmax` says the same, but on a CPU takes over four times as long in bfloat16.
    return logits.max(dim=-1).indices, None


def pick_greedy_with_scores(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `pick_greedy`, and the logits, for `probability_of_best`."""
    return pick_greedy(logits)[0], logits


def probability_of_best(scores: torch.Tensor) -> torch.Tensor:
    """How likely the best token of each row is, by the drafter.

    Args:
        scores: ``[B, k, V]``; of all positions, since one pass over them takes less
            than one for each position.

    Returns:
        ``[B, k]`` float32; 0 where the drafter computed NaN.
    """
    best = scores.log_softmax(dim=-1).amax(dim=-1)
    return best.float().exp().nan_to_num(0.0)
