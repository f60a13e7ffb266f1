# SPDX-License-Identifier: Apache-2.0
"""The cases of the matrix: row x drafter x family x runner.

`EVERY_RUN` holds some of them, such that every two values that may meet do so in one;
`pytest -m matrix` runs the others. Values marked `slow` here are only in the others.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

from tests.pairs import all_pairs
from tests.serving.lossless.rows import ENGINES, ROWS, Row

# As `tests.serving.conftest.DRAFTERS` makes them: (tokens per draft, exact)
DRAFTERS = {
    "shared-1": (1, True),
    "shared-4": (4, True),
    "own-1": (1, True),
    "own-some": (3, False),
    "own-random": (3, False),
    "mixed": (4, False),
    "overflows": (4, False),
    "heads": (4, False),
    "block": (4, False),
    "bidirectional": (4, False),
    "chain": (4, False),
    "position-layers": (4, False),
    "full-rank": (4, True),
    "reference": (4, False),  # which the method finds by itself
}


class Family(NamedTuple):
    """A target and what it is tried with.

    Attributes:
        target: Of `tests.serving.conftest.TinyTargets`, or the demo target.
        drafters: In every run.
        more: Drafters that are slow.
        v2: Drafters for the V2 runner.
        engines: Only these of `ENGINES`, if not None.
        settings: vLLM settings of every engine.
        few_blocks: Cache blocks that are too few for four requests.
        spares: Facts that no row needs to show.
        block_sizes: Of the KV-cache groups, ascending.
        slow: With every drafter.
        without: Rows that vLLM answers wrong with any speculation.
    """

    target: str
    drafters: tuple[str, ...]
    more: tuple[str, ...] = ()
    v2: tuple[str, ...] = ()
    engines: tuple[str, ...] | None = None
    settings: dict[str, Any] = {}
    few_blocks: int = 21
    spares: tuple[str, ...] = ()
    block_sizes: tuple[int, ...] = (32,)
    slow: bool = False
    without: tuple[str, ...] = ()


# Layers that can be copied into the drafter's own.
COPYABLE = ("shared-4", "own-1")
OTHERS = ("shared-4", "own-random")
# What its engines change is not a matter of the cache, which families differ in.
_CACHE = ("default", "tight", "scheduled ahead", "no prefix cache", "blocks of 64")
FAMILIES = {
    "llama": Family(
        "llama",
        ("shared-4", "shared-1", "own-1", "own-some", "mixed", "overflows"),
        (
            *("own-random", "heads", "block", "bidirectional", "chain"),
            *("position-layers", "full-rank"),
        ),
        v2=("shared-4", "shared-1", "mixed", "heads", "chain"),
    ),
    "qwen3": Family(
        "qwen3",
        ("shared-1", "own-1", "mixed"),
        ("shared-4", "own-some"),
        engines=_CACHE,
    ),
    # vLLM admits only as many requests as have room for their windows, and throws one
    # out only where lookahead slots are wanted too.
    "mistral": Family(
        "mistral",
        COPYABLE,
        ("mixed",),
        v2=("own-1",),
        engines=_CACHE,
        few_blocks=12,
        spares=("preemptions", "preempted_twice"),
    ),
    "gemma3": Family(
        "gemma3",
        OTHERS,
        v2=OTHERS,
        engines=_CACHE,
        few_blocks=40,
        spares=("preempted_twice",),
        block_sizes=(32,) * 4,
    ),
    "gemma3-one-group": Family(
        "gemma3",
        ("shared-4",),
        engines=_CACHE,
        settings={"disable_hybrid_kv_cache_manager": True},
    ),
    "qwen3_moe": Family("qwen3_moe", OTHERS, engines=_CACHE),
    "qwen2": Family("qwen2", COPYABLE, engines=_CACHE, slow=True),
    "gemma2": Family(
        "gemma2",
        ("shared-4",),
        engines=_CACHE,
        few_blocks=40,
        spares=("preempted_twice",),
        block_sizes=(32,) * 4,
        slow=True,
    ),
    "phi3": Family("phi3", OTHERS, engines=_CACHE, slow=True),
    # Their layers give the whole stream, where others give it in two parts.
    "exaone4": Family(
        "exaone4",
        OTHERS,
        engines=_CACHE,
        few_blocks=40,
        block_sizes=(32,) * 4,
        # With n-gram drafts two of the 36 answers begin with the same wrong tokens
        # (docs/upstream/README.md).
        without=("sampled, top-k 1, n = 3",),
        spares=("preempted_twice",),
    ),
    "cohere2": Family(
        "cohere2",
        OTHERS,
        engines=_CACHE,
        few_blocks=40,
        block_sizes=(32,) * 4,
        slow=True,
    ),
    "gpt_oss": Family(
        "gpt_oss",
        OTHERS,
        engines=_CACHE,
        few_blocks=40,
        block_sizes=(32,) * 2,
        slow=True,
    ),
    "int8-weights": Family("llama_w8a8", ("shared-4",), engines=_CACHE, slow=True),
    "fp8-cache": Family(
        "llama",
        COPYABLE,
        engines=("default", "tight"),
        settings={"kv_cache_dtype": "fp8"},
        slow=True,
    ),
    # The sliding-window layers keep their type, so that blocks differ in size.
    "gemma3-fp8-cache": Family(
        "gemma3",
        ("shared-4",),
        engines=("default", "tight"),
        settings={
            "kv_cache_dtype": "fp8",
            "kv_cache_dtype_skip_layers": ["sliding_window"],
        },
        few_blocks=22,
        spares=("preempted_twice",),
        block_sizes=(32, 32, 32, 128),
        slow=True,
    ),
    "smollm2": Family(
        "smollm2", ("shared-1", "mixed"), ("own-1", "own-some"), engines=("tight",)
    ),
    "smollm2-bfloat16": Family(
        "smollm2",
        ("own-1", "own-some", "reference"),
        ("shared-1", "mixed"),
        engines=("tight",),
        settings={"dtype": "bfloat16"},
    ),
}
RUNNERS = ("V1", "V2")


_PLAIN = str.maketrans({" ": "_", ",": None, "'": None})


class Case(NamedTuple):
    """One value of each axis, by name."""

    row: str
    drafter: str
    family: str
    runner: str

    def __str__(self) -> str:
        names = (self.family, self.drafter, self.row, self.runner)
        return "-".join(name.translate(_PLAIN) for name in names)


def _may_meet(row: Row, drafter: str, family: Family, runner: str) -> bool:
    if family.engines is not None and row.engine not in family.engines:
        return False
    if row.name in family.without:
        return False
    if runner == "V2" and not (row.on_v2 and drafter in family.v2):
        return False
    # So few are run on V2 that each must show what it is named for.
    if runner == "V2" and {"preemptions"} & set(row.shows) & set(family.spares):
        return False
    return DRAFTERS[drafter][0] >= ENGINES[row.engine].least_tokens


def _cases(*, slow: bool) -> list[Case]:
    """All that may meet, those of one engine side by side."""
    rows = sorted(ROWS, key=lambda row: list(ENGINES).index(row.engine))
    return [
        Case(row.name, drafter, name, runner)
        for runner in RUNNERS
        for name, family in FAMILIES.items()
        for drafter in (*family.drafters, *(family.more if slow else ()))
        for row in rows
        if (slow or not family.slow) and _may_meet(row, drafter, family, runner)
    ]


_ROWS = {row.name: row for row in ROWS}


def engine_of(case: Case) -> Hashable:
    """Cases of the same engine share it."""
    return _ROWS[case.row].engine, *case[1:]


def _seconds(case: Case) -> float:
    """About what it costs to start the engine, in rows."""
    return 100.0 if case.runner == "V2" else 10.0


WHOLE = _cases(slow=True)
EVERY_RUN = frozenset(all_pairs(_cases(slow=False), engine_of, _seconds))
