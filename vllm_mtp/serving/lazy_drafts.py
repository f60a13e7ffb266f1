# SPDX-License-Identifier: Apache-2.0
"""Drafts that are computed when something first reads them.

On a CPU a draft runs in the runner's own thread. Made at once, it stands between the
tokens just sampled and whoever waits for them, which is felt in the time to the first
token. vLLM's engine asks for the drafts only after it has sent these tokens on their
way, so that is soon enough.
"""

from collections.abc import Callable, Iterator
from typing import Any


class LateDrafts(list[list[int]]):
    """Token ids ``[B][k]``, in the form that vLLM takes from drafters without tensors.

    The runner keeps such a list as it is and sends it to the scheduler when asked, in
    one process or pickled. Reading it in any of these ways computes it, once.

    Args:
        compute: Gives the token ids. What it raises, the reader gets.
    """

    def __init__(self, compute: Callable[[], list[list[int]]]) -> None:
        super().__init__()
        self._compute: Callable[[], list[list[int]]] | None = compute

    def _fill(self) -> None:
        if self._compute is not None:
            self.extend(self._compute())
            self._compute = None

    def __iter__(self) -> Iterator[list[int]]:
        self._fill()
        return super().__iter__()

    def __len__(self) -> int:
        self._fill()
        return super().__len__()

    def __getitem__(self, index: Any) -> Any:
        self._fill()
        return super().__getitem__(index)

    def __eq__(self, other: object) -> bool:
        self._fill()
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return list, (list(self),)
