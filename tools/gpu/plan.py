# SPDX-License-Identifier: Apache-2.0
"""What the run does, in which order, and how long each piece may take.

All times are seconds; all estimates are guesses until a GPU has run them. Only the
standard library is used, so that the plan can be printed anywhere.
"""

from collections.abc import Iterable
from dataclasses import dataclass

LEASE = 15 * 60
"""Device time that is lent, counted from the asking for a machine."""
MOST = 12 * 60
"""What the needed pieces may take of it, everything before them included."""
BUDGET = 500
"""What the command takes at most, unless told otherwise."""
DRY_BUDGET = 1800
BEFORE = (
    ("a bare machine starts", 90),
    ("call 1: load 1 and the checkout travel and are unpacked", 60),
    ("call 2: load 2 travels and is unpacked", 60),
)


@dataclass(frozen=True)
class Piece:
    """One process of the run.

    Attributes:
        estimate: Seconds, the start of Python and vLLM included.
        limit: Seconds after which it is killed.
        needed: Whether the run has failed without it.
    """

    name: str
    does: str
    estimate: int
    limit: int
    needed: bool = True


PIECES = (
    Piece("check", "what was unpacked imports, and vLLM alone answers", 60, 150),
    Piece("exact-bfloat16", "texts, first drafts and replays, by graphs", 75, 150),
    Piece("waits", "a draft waits for the device nowhere", 25, 60),
    Piece("exact-float32", "as exact-bfloat16, with the other attention", 75, 150),
    Piece("cost-target", "an 8B target's own decode step", 50, 110),
    Piece("cost-own", "a draft of five own layers, with a graph and without", 95, 160),
    Piece("cost-eagle3", "vLLM's EAGLE-3 in the same conditions", 65, 120),
    # Only if there is time.
    Piece("cost-mixed", "a draft of shared and own layers", 80, 150, needed=False),
    Piece("batches-target", "the decode step at more batch sizes", 45, 90, False),
    Piece("batches-own", "the draft at more batch sizes", 60, 120, False),
)


def needed_seconds() -> int:
    """Of the needed pieces together, by the estimates."""
    return sum(piece.estimate for piece in PIECES if piece.needed)


def describe(pieces: Iterable[Piece] = PIECES) -> str:
    """The plan as text, one line per piece."""
    lines = [f"{seconds:5} s            {what}" for what, seconds in BEFORE]
    for piece in pieces:
        times = f"{piece.estimate:5} s (<={piece.limit:4})"
        mark = "" if piece.needed else "  (if there is time)"
        lines.append(f"{times}  {piece.name}: {piece.does}{mark}")
    before = sum(seconds for _, seconds in BEFORE)
    total = before + needed_seconds()
    lines.append(
        f"needed pieces: {needed_seconds()} s, {before} s before them; together "
        f"{total} s = {total / 60:.1f} of at most {MOST // 60} minutes; "
        f"{LEASE // 60} are lent"
    )
    return "\n".join(lines)


def why_skipped(piece: Piece, left: float) -> str | None:
    """Why a piece is not started with ``left`` seconds to go; None if it is.

    A needed one is started for half of it, too: what it finds until then is kept.
    """
    if left >= (piece.estimate / 2 if piece.needed else piece.estimate):
        return None
    return f"{max(left, 0):.0f} s are left, it takes about {piece.estimate} s"
