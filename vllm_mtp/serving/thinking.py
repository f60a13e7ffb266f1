# SPDX-License-Identifier: Apache-2.0
"""Thinking budgets where drafts are verified, for the V1 runner.

vLLM counts a request's thinking tokens once per step, and guesses from the number of
drafts which row of the step is to end the thinking. A draft that is rejected, or that
itself ends or starts thinking, makes the guess wrong; and an end of more than one token
may be written into the next request's row. Here every row of a step asks vLLM's own
rule for steps of one token, with the tokens that it follows.
"""

import copy
from typing import Any

import torch
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

# As large as vLLM's own, so that no bias or penalty outweighs it.
_FORCED = 1e9
# Key of a request's state: how many tokens of its answer the rule has been told.
_TOLD = "tokens told"


class ThinkingBudgets(ThinkingBudgetStateHolder):
    """What vLLM forces in a step of one token, for every row of a step of several."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # By request: the forced token behind the answer so far, behind the first
        # draft, ..., behind the last; None where the model is free.
        self._forced: dict[int, list[int | None]] = {}

    def sync_batch(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that come, go and change rows."""
        # vLLM leaves the budget of a request that has ended to one without any that
        # takes its row: such a row is not among those removed.
        for _, row, direction in batch_update.moved if batch_update else ():
            if direction is MoveDirectionality.UNIDIRECTIONAL:
                self._state.pop(row, None)
        super().sync_batch(batch_update)

    def update_state(
        self,
        output_token_ids: list[list[int]],
        spec_token_ids: list[list[int]] | None,
        repeat_indices: torch.Tensor | None = None,
    ) -> None:
        """Look at a step's tokens.

        Args:
            output_token_ids: The answers so far, by request.
            spec_token_ids: The drafts that the step verifies, by request.
            repeat_indices: Not used.
        """
        self._forced = {}
        for request, state in self._state.items():
            answer = output_token_ids[request]
            drafts = spec_token_ids[request] if spec_token_ids else []
            # Once for every length that there was: verified tokens come in bunches,
            # and a request that was thrown out is new to vLLM.
            for length in range(state.get(_TOLD, 0), len(answer)):
                self._forced_behind(state, answer[:length])
            state[_TOLD] = len(answer)
            trial = copy.copy(state)  # no draft is verified yet
            self._forced[request] = [
                self._forced_behind(trial, answer + drafts[:length])
                for length in range(len(drafts) + 1)
            ]

    def _forced_behind(self, state: dict[str, Any], tokens: list[int]) -> int | None:
        """Tell vLLM's rule of one more token; returns what it forces behind it."""
        state.update(
            output_tok_ids=tokens,
            spec_token_ids=[],
            in_spec_mode=False,
            force_index=[],
        )
        self._update_think_state(state)
        count, end = state["end_count"], self.think_end_token_ids
        forces = state["in_end"] and state["force_index"] and count < len(end)
        return end[count] if forces else None

    @staticmethod
    def _find_last_sequence_index(target_list: list[int], token_ids: list[int]) -> int:
        # It is asked for each row of a step, mostly in vain; vLLM's own loops over all
        # of the text.
        if not token_ids or token_ids[0] not in target_list:
            return -1
        find = ThinkingBudgetStateHolder._find_last_sequence_index
        return find(target_list, token_ids)

    def apply_to_logits(
        self,
        logits: torch.Tensor,
        predict_bonus_token: bool,
        spec_token_ids: list[list[int]] | None,
    ) -> torch.Tensor:
        """Force what `update_state` found.

        Args:
            logits: ``[B, V]``, the row behind all drafts of each request; or
                ``[drafts, V]``, the rows that verify drafts.
            predict_bonus_token: Whether it is the former.
            spec_token_ids: The drafts, by request.

        Returns:
            ``logits``, changed in place.
        """
        counts = [len(drafts) for drafts in spec_token_ids or ()]
        rows: list[int] = []
        tokens: list[int] = []
        for request, forced in self._forced.items():
            # A step without drafts may have no row behind them.
            if predict_bonus_token or not any(counts):
                first, chosen = request, forced[-1:]
            else:
                first, chosen = sum(counts[:request]), forced[:-1]
            for row, token in enumerate(chosen, first):
                if token is not None and row < len(logits):
                    rows.append(row)
                    tokens.append(token)
        if rows:
            index = torch.tensor([rows, tokens], pin_memory=logits.is_cuda)
            where = index.to(logits.device, non_blocking=True)
            value = logits.new_full((), _FORCED)
            logits.index_put_((where[0], where[1]), value)
        return logits
