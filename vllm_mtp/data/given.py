# SPDX-License-Identifier: Apache-2.0
"""Conversations that have an answer already: text to train on that no engine writes.

Only the last turn is trained on. A chat template may render an earlier turn otherwise
than the target wrote it, above all without its thinking, so what stands there is not
what the target would have to continue. Whoever wants an earlier turn too gives the
conversation up to there as a row of its own.
"""

import sys
from collections.abc import Collection, Iterable, Iterator
from itertools import islice

from tqdm import tqdm

from vllm_mtp.data.odd_rows import OddRowError, OddRows
from vllm_mtp.data.prompts import Prompt
from vllm_mtp.data.render import BATCH, TOO_LONG, Renderer
from vllm_mtp.data.settings import PromptCounts, RunFile, RunSettings
from vllm_mtp.data.shard import Shard
from vllm_mtp.data.split import prompt_id
from vllm_mtp.data.store import Row, Store

PART_ROWS = 1000


class GivenAnswers:
    """Makes rows of answered conversations.

    Args:
        renderer: Of the target, with its chat template.
        ends: Tokens that end an answer.
        settings: How long prompts and answers may be, and which part to take.
        odd: Counts what cannot be used.
    """

    def __init__(
        self,
        renderer: Renderer,
        ends: Collection[int],
        settings: RunSettings,
        odd: OddRows,
    ) -> None:
        self._renderer, self._ends, self._odd = renderer, ends, odd
        self._longest_prompt = settings.max_prompt_tokens
        self._longest = settings.sampling.max_tokens
        self._shard = Shard.parse(settings.source.shard)
        self._seen: set[str] = set()
        self._kept = self._duplicates = self._others = 0

    @property
    def counts(self) -> PromptCounts:
        """What became of the rows so far."""
        skipped = self._odd.counts
        too_long = skipped.pop(TOO_LONG, 0)
        left_out = self._duplicates + self._others + too_long + sum(skipped.values())
        return PromptCounts(
            read=self._kept + left_out,
            duplicates_dropped=self._duplicates,
            too_long_dropped=too_long,
            odd_skipped=skipped,
            in_other_shards=self._others,
        )

    def rows(self, prompts: Iterable[Prompt]) -> Iterator[Row]:
        """Yield a row for each conversation that can be used.

        The prompt's tokens are those that the chat endpoint would give the target, and
        the answer's those that the template writes behind them, up to the first that
        ends an answer.

        Args:
            prompts: With answers, and read with the same ``odd``. The same answer to
                the same prompt is taken once.
        """
        chosen = self._chosen(prompts)
        while batch := list(islice(chosen, BATCH)):
            for prompt, ids, answer in self._renderer.render_answered(batch, self._odd):
                if len(ids) <= self._longest_prompt:
                    self._kept += 1
                    yield self._row(prompt, ids, answer)
                    continue
                detail = f"{len(ids)} tokens, --max-prompt-tokens is "
                detail += str(self._longest_prompt)
                self._odd.note(OddRowError(TOO_LONG, prompt.where, detail))

    def _chosen(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        for prompt in prompts:
            assert prompt.answer is not None
            text = prompt_id((*prompt.messages, prompt.answer), prompt.tools)
            number = len(self._seen)
            self._seen.add(text)
            if len(self._seen) == number:
                self._duplicates += 1
            elif self._shard.holds(number):
                yield prompt
            else:
                self._others += 1

    def _row(self, prompt: Prompt, ids: list[int], answer: list[int]) -> Row:
        # Behind it templates write more, such as a line's end, which nobody generates.
        end = next((n for n, each in enumerate(answer, 1) if each in self._ends), None)
        kept = answer[: min(end or len(answer), self._longest)]
        stopped = len(kept) == end
        start, stop = len(ids), len(ids) + len(kept)
        return {
            "prompt_id": prompt.identifier,
            "split_id": prompt.split_id,
            "category": prompt.category,
            "input_ids": [*ids, *kept],
            "loss_spans": [[start, stop]] if len(kept) > stopped else [],
            "finish_reason": "stop" if stopped else "length",
        }


def keep(rows: Iterator[Row], store: Store, settings: RunSettings) -> RunFile:
    """Store rows in parts. It takes minutes, so a stopped run begins anew.

    Args:
        rows: All of the run.
        store: Where they go.
        settings: Of the run.

    Returns:
        What was asked for, for `Store.finish`.
    """
    run = RunFile(settings=settings, prompts_sha256="")
    store.start(run)
    store.discard_parts()
    # A log file shall not get a line per second.
    every = 1.0 if sys.stderr.isatty() else 30.0
    with tqdm(unit="row", mininterval=every) as bar:
        while part := list(islice(rows, PART_ROWS)):
            store.write_part(part)
            bar.update(len(part))
    return run
