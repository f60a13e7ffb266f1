# SPDX-License-Identifier: Apache-2.0
"""What a run of ``vllm-mtp generate`` says while it goes on."""

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

# On disk a token takes 4 bytes in the dataset, and about 6 in the parts before.
_BYTES_PER_TOKEN = 10


class Progress:
    """The progress bar, and an estimate as soon as the first part is there.

    A measurement with a few short texts would be quicker, but was wrong by a factor
    of 8: answers end when they like, and long texts are slower.

    Args:
        total: Prompts of the run.
        todo: Prompts of each part that is not answered yet.
        prompt_tokens: Tokens of all prompts together.
    """

    def __init__(self, total: int, todo: Sequence[int], prompt_tokens: int) -> None:
        self._total, self._left, self._prompt_tokens = total, sum(todo), prompt_tokens
        self._tokens = 0
        self._first = True
        self._start = time.perf_counter()
        if len(todo) > 1:
            print(f"estimating from the first {todo[0]:,} answers ...", flush=True)
        # A log file shall not get a line per second.
        every = 1.0 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=total, initial=total - self._left, unit="prompt", mininterval=every
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def answered(self, tokens: int) -> None:
        """Count one answer.

        Args:
            tokens: Its length.
        """
        self._tokens += tokens
        rate = self._tokens / (time.perf_counter() - self._start)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update()

    def part_done(self, prompts: int, seconds: float) -> None:
        """Count one part; after the first, say how long the others will take."""
        self._left -= prompts
        if self._first and self._left:
            self._bar.write(self._estimate(prompts, seconds))
            sys.stdout.flush()  # a log file's readers wait for this line
        self._first = False

    def _estimate(self, prompts: int, seconds: float) -> str:
        mean = self._tokens / prompts
        megabytes = (self._prompt_tokens + mean * self._total) * _BYTES_PER_TOKEN / 1e6
        return (
            f"estimate: {prompts:,} answers took {time_text(seconds)} "
            f"({self._tokens / seconds:,.0f} tokens/s, {mean:,.0f} tokens per answer); "
            f"the other {self._left:,} will take about "
            f"{time_text(self._left * seconds / prompts)}, and all about "
            f"{megabytes:,.0f} MB of disk"
        )


def time_text(seconds: float) -> str:
    """A length of time for people: ``"95 s"``, ``"12 min"``, ``"3.4 h"``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
