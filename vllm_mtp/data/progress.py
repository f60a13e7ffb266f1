# SPDX-License-Identifier: Apache-2.0
"""What a run of ``vllm-mtp generate`` says while it goes on."""

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from vllm_mtp.data.render import Request

# On disk a token takes 4 bytes in the dataset, and about 6 in the parts before.
_BYTES_PER_TOKEN = 10


class Progress:
    """The progress bar, and an estimate as soon as the first prompts are answered.

    A measurement with a few short texts would be quicker, but was wrong by a factor
    of 8: answers end when they like, and long texts are slower. And the first answers
    to end are the short ones, so all of the first prompts' answers are waited for.

    Args:
        requests: All of the run.
        missing: Those to answer, in the order in which they are begun.
        first: How many of them the estimate is made from.
    """

    def __init__(
        self, requests: Sequence[Request], missing: Sequence[Request], first: int
    ) -> None:
        self._prompt_tokens = sum(len(request.token_ids) for request in requests)
        self._total, self._left = len(requests), len(missing)
        few = missing[:first] if len(missing) > first else ()
        self._first = len(few)
        self._waited_for = {request.prompt_id for request in few}
        self._tokens = self._tokens_of_first = 0
        self._start = time.perf_counter()
        if few:
            print(f"estimating from the first {first:,} answers ...", flush=True)
        # A log file shall not get a line per second.
        every = 1.0 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=self._total,
            initial=self._total - self._left,
            unit="prompt",
            mininterval=every,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def answered(self, request: Request, tokens: int) -> None:
        """Count one answer.

        Args:
            request: Which one.
            tokens: Its length.
        """
        self._tokens += tokens
        self._left -= 1
        seconds = time.perf_counter() - self._start
        self._bar.set_postfix_str(f"{self._tokens / seconds:,.0f} tokens/s", False)
        self._bar.update()
        if request.prompt_id in self._waited_for:
            self._waited_for.remove(request.prompt_id)
            self._tokens_of_first += tokens
            if not self._waited_for and self._left:
                self._bar.write(self._estimate(seconds))
                sys.stdout.flush()  # a log file's readers wait for this line

    def _estimate(self, seconds: float) -> str:
        mean = self._tokens_of_first / self._first
        rate = max(self._tokens, 1) / seconds
        megabytes = (self._prompt_tokens + mean * self._total) * _BYTES_PER_TOKEN / 1e6
        return (
            f"estimate: {self._first:,} answers took {time_text(seconds)} "
            f"({rate:,.0f} tokens/s, {mean:,.0f} tokens per answer); "
            f"the other {self._left:,} will take about "
            f"{time_text(self._left * mean / rate)}, and all about "
            f"{megabytes:,.0f} MB of disk"
        )


def time_text(seconds: float) -> str:
    """A length of time for people: ``"95 s"``, ``"12 min"``, ``"3.4 h"``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
