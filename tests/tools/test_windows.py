# SPDX-License-Identifier: Apache-2.0
"""The table of windows, from turns that were made up."""

from tools.windows import ALL, Turn, measure, rows_of
from vllm_mtp.bench.plan import Load
from vllm_mtp.metrics import AcceptanceCounts


class Engine:
    """Twice as fast with a window; everything takes longer from turn to turn."""

    def __init__(self) -> None:
        self.seen: list[tuple[int | None, int]] = []

    def turn(self, load: Load, window: int | None, max_tokens: int) -> Turn:
        self.seen.append((window, max_tokens))
        counts = AcceptanceCounts(40, 160, (30, 10) if window is ALL else (20, 10))
        seconds = (2.0 if window is ALL else 1.0) * (1 if len(self.seen) < 4 else 3)
        return Turn(window, counts, 80, seconds)


def test_ratios_are_taken_within_a_round() -> None:
    engine = Engine()
    turns = measure(engine, Load("2048 tokens", ("a",), 1, 80), [ALL, 256], 2)  # type: ignore[arg-type]
    assert engine.seen == [(ALL, 1), (ALL, 80), (256, 80), (256, 80), (ALL, 80)]
    assert rows_of("2048 tokens", turns) == [
        ("2048 tokens", "all", "2.000", "100.0", "1.00 (1.00 to 1.00)"),
        ("2048 tokens", "256", "1.750", "50.0", "2.00 (2.00 to 2.00)"),
    ]
