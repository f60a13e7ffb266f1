# SPDX-License-Identifier: Apache-2.0
"""Write the tables and the plot of docs/scaling.md from the cost model.

    python -m tools.scaling            write them
    python -m tools.scaling --check    only say whether the tables are up to date

Nothing is measured here: see `tools.cost_model`.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from textwrap import fill
from typing import NamedTuple

from tools import cost_model as model
from tools.cost_model import Drafter, Hardware, Point, Target
from tools.tables import Part
from vllm_mtp.drafter.layout import most_read
from vllm_mtp.markdown import table

ROOT = Path(__file__).parents[1]
PAGE, PLOT = ROOT / "docs" / "scaling.md", ROOT / "docs" / "scaling.png"

K = 1024
BATCHES, CONTEXTS = (1, 8, 32, 128), (K, 8 * K, 32 * K, 128 * K)
POINTS = (Point(1, K), Point(32, K), Point(8, 32 * K), Point(1, 128 * K))


class Size(NamedTuple):
    """A target, what it runs on and the layers of our drafter for it."""

    target: Target
    hardware: Hardware
    layers: str

    def ours(self, k: int, layers: str | None = None) -> Drafter:
        """Our drafter, with an LM head cut to 32,768 tokens as `cheap` has a cut one;
        ``layers`` makes another one, with the whole LM head and without bridges."""
        if layers:
            rows = self.target.vocab
            return model.ours(self.target, layers, k, rows, bridges=False)
        return model.ours(self.target, self.layers, k, 32_768)


SIZES = (
    Size(model.LLAMA_1B, model.H100, "shared:0-1,own:8,15"),
    Size(model.LLAMA_8B, model.H100, "shared:0-2,own:12,20,27,31"),
    Size(model.LLAMA_70B, model.FOUR_H100, "shared:0-3,own:30,50,68,79"),
)
MEASURED_AL = 2.34
"""Of `cheap`, for SmolLM2-135M-Instruct, k = 4."""
PUBLISHED_AL = {"EAGLE-3": 3.96, "DFlash": 4.24, "DSpark": 5.00, "LongSpark": 4.78}
"""Qwen3-8B, temperature 1, 7 drafts, mean of 8 benchmarks (arXiv 2609.37029)."""

PUBLISHED_SPEED = {
    model.QWEN3_4B: ((3.74, 1.09), (4.20, 1.58), (4.93, 1.79), (4.73, 1.88)),
    model.QWEN3_8B: ((3.96, 1.22), (4.24, 1.69), (5.00, 1.92), (4.78, 1.99)),
    model.QWEN3_14B: ((3.84, 1.33), (4.21, 1.81), (4.97, 2.09), (4.82, 2.13)),
}
"""Acceptance length and speed-up of EAGLE-3, DFlash, DSpark and LongSpark with 32
requests at once (the same paper)."""
PUBLISHED_LONG = {
    Point(8, 32 * K): (1129, 1259, 1314, 1737, 1918),
    Point(4, 64 * K): (884, 1072, 919, 1217, 1572),
    Point(2, 128 * K): (160, 159, 164, 191, 213),
}
"""Tokens per second without a drafter and with the same four, for Qwen3-8B (the same
paper). The batch is not given there and is our guess."""

WINDOW = 1024  # of `cheap`
PEERS = (model.eagle3, model.dflash, model.dspark, model.longspark)


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    old = PAGE.read_text("utf-8")
    if check:
        return int(renewed(old) != old)
    PAGE.write_text(renewed(old), "utf-8")
    plot()
    return 0


def renewed(page: str) -> str:
    """The page with all tables made anew."""
    for part in PARTS:
        page = part.renewed(page)
    return page


def fitted() -> str:
    """What was measured, beside what the fitted constants give."""
    head = ("Forward", "Layers, ms", "LM head, ms", "All, ms", "Model, ms", "Off by")
    fit = model.fit(model.MEASURED)
    roofline = model.fit(model.MEASURED, overlap=True)
    rows = [
        (
            *(step.name, _ms(step.layers), _ms(step.head), _ms(step.seconds)),
            *(_ms(fit.hardware.seconds(step.work)), _signed(off), _signed(other)),
        )
        for step, off, other in zip(
            model.MEASURED, fit.residuals, roofline.residuals, strict=True
        )
    ]
    found, roof = fit.hardware, roofline.hardware
    words = (
        f"Fitted: {found.bandwidth / 1e9:.1f} GB/s, {found.flops / 1e9:.0f} GFLOP/s "
        f"({found.flops / model.GEMM_FLOPS * 100:.0f} % of a large matrix product's "
        f"{model.GEMM_FLOPS / 1e9:.0f}), {found.overhead * 1e3:.1f} ms per forward. "
        f"As a roofline: {roof.bandwidth / 1e9:.1f} GB/s and "
        f"{roof.overhead * 1e3:.1f} ms, with the rate of the matrix product."
    )
    return table((*head, "Off by, roofline"), rows) + f"\n\n{fill(words, 88)}"


def checked() -> str:
    """Published speed-ups at 32 requests, beside the model's."""
    rows = []
    for target, published in PUBLISHED_SPEED.items():
        for make, (length, speed) in zip(PEERS, published, strict=True):
            drafter, point = make(target, 7), Point(32, 2 * K)
            own = model.speed_up(target, model.H100, drafter, point, length)
            rows.append(
                (target.name, drafter.name, f"{length:.2f}", *_beside(speed, own))
            )
    head = ("Target", "Drafter", "AL", "Published", "Model", "Model over published")
    return f"{table(head, rows)}\n\n{_optimism()}"


def _optimism() -> str:
    plain = ratios(model.H100)
    roofline = ratios(replace(model.H100, overlap=1))
    return fill(
        f"Mean of the last column (geometric): {geometric_mean(plain):.2f}, from "
        f"{min(plain):.2f} to {max(plain):.2f}. With reading and computing overlapped "
        f"(the usual roofline) it would be {geometric_mean(roofline):.2f}, from "
        f"{min(roofline):.2f} to {max(roofline):.2f}.",
        88,
    )


def ratios(hardware: Hardware) -> list[float]:
    """The model's speed-ups over the published ones."""
    return [
        model.speed_up(target, hardware, make(target, 7), Point(32, 2 * K), length)
        / speed
        for target, published in PUBLISHED_SPEED.items()
        for make, (length, speed) in zip(PEERS, published, strict=True)
    ]


def checked_long() -> str:
    """The same for long contexts."""
    rows = []
    for point, (base, *with_drafter) in PUBLISHED_LONG.items():
        for make, rate in zip(PEERS, with_drafter, strict=True):
            drafter = make(model.QWEN3_8B, 7)
            length = PUBLISHED_AL[drafter.name]
            own = model.speed_up(model.QWEN3_8B, model.H100, drafter, point, length)
            rows.append((_where(point), drafter.name, *_beside(rate / base, own)))
    head = ("Requests x context", "Drafter", "Published", "Model")
    return table((*head, "Model over published"), rows)


def _beside(published: float, own: float) -> tuple[str, str, str]:
    return f"{published:.2f}", f"{own:.2f}", f"{own / published:.2f}"


def speed_ups() -> str:
    """Predicted speed-ups, a table for each target."""
    return "\n\n".join(map(_speed_ups, SIZES))


def _speed_ups(size: Size) -> str:
    columns = cases(size)
    rows = [
        (
            *(str(batch), _tokens(context)),
            *(_speed(size, drafter, length, point) for _, drafter, length in columns),
        )
        for context in CONTEXTS
        for batch in BATCHES
        if fits(size, None, point := Point(batch, context))
    ]
    head = ("Requests", "Context", *(name for name, *_ in columns))
    return f"{_title(size)}\n\n{table(head, rows)}"


def cases(size: Size) -> list[tuple[str, Drafter, float]]:
    """The columns: a name, a drafter and the acceptance length assumed for it."""
    peers = [make(size.target, 7) for make in PEERS]
    hoped = PUBLISHED_AL["LongSpark"]
    found = [(d.name, d, PUBLISHED_AL[d.name]) for d in peers]
    found += [
        ("ours, k = 7", size.ours(7), hoped),
        ("ours, k = 4", size.ours(4), model.acceptance_cut(hoped, 7, 4)),
        ("ours, k = 4", size.ours(4), MEASURED_AL),
    ]
    return [(f"{name}, AL {length:.2f}", d, length) for name, d, length in found]


def _speed(size: Size, drafter: Drafter, length: float, point: Point) -> str:
    if not fits(size, drafter, point):
        return "no room"
    return f"{speed_at(size, drafter, length, point):.2f}"


def speed_at(size: Size, drafter: Drafter, length: float, point: Point) -> float:
    """Predicted speed-up."""
    return model.speed_up(size.target, size.hardware, drafter, point, length)


def fits(size: Size, drafter: Drafter | None, point: Point) -> bool:
    """Whether the pool holds that many tokens."""
    room = model.pool_tokens(size.target, size.hardware, drafter)
    return point.batch * point.context <= room


def costs() -> str:
    """Time of a draft and of a cycle in decoding steps, a table for each target."""
    return "\n\n".join(map(_costs, SIZES))


def _costs(size: Size) -> str:
    head = ("Drafter", *map(_where, POINTS), *(f"even: {_where(p)}" for p in POINTS))
    rows = [
        (
            name_of(drafter),
            *(f"{draft_cost(size, drafter, p):.2f}" for p in POINTS),
            *(
                f"{model.break_even(size.target, size.hardware, drafter, p):.2f}"
                for p in POINTS
            ),
        )
        for drafter in drafters(size)
    ]
    return f"{_title(size)}\n\n{table(head, rows)}"


def draft_cost(size: Size, drafter: Drafter, point: Point) -> float:
    """Time of a draft in decoding steps."""
    step = model.target_seconds(size.target, size.hardware, 1, point)
    return model.draft_seconds(size.target, size.hardware, drafter, point) / step


def drafters(size: Size) -> list[Drafter]:
    """The rows of the tables that need no acceptance length."""
    peers = [make(size.target, 7) for make in PEERS]
    return [*peers, size.ours(7), size.ours(4), size.ours(4, "shared:all")]


def kept(size: Size) -> list[Drafter]:
    """Those that differ in what they keep, whatever k is."""
    found = drafters(size)
    return [*found[:-2], found[-1]]


def needed() -> str:
    """The acceptance length with which ours, k = 7, is as fast as another."""
    rows = [
        (size.target.name, name, *(f"{needed_al(size, name, p):.2f}" for p in POINTS))
        for size in SIZES
        for name in PUBLISHED_AL
    ]
    return table(("Target", "As fast as", *map(_where, POINTS)), rows)


def needed_al(size: Size, name: str, point: Point) -> float:
    """See `needed`."""
    peer = next(d for d in drafters(size) if d.name == name)
    even = [
        model.break_even(size.target, size.hardware, drafter, point)
        for drafter in (size.ours(7), peer)
    ]
    return PUBLISHED_AL[name] * even[0] / even[1]


def memory() -> str:
    """What a drafter keeps, and what that leaves for requests."""
    head = (
        *("Target", "Drafter", "Own KV, bytes per token", "Part of the pool"),
        *("Weights, GB", "Pool, tokens", "Pool, without a drafter = 1"),
    )
    return table(head, [row for size in SIZES for row in _memory(size)])


def _memory(size: Size) -> Iterable[tuple[str, ...]]:
    target = size.target
    bare = model.pool_tokens(target, size.hardware, None)
    yield target.name, "none", "0", _part(0), "0.00", f"{bare:,.0f}", "1.000"
    for drafter in kept(size):
        own = drafter.own_kv_bytes(target)
        share = own / (own + target.layers * target.kv_layer_bytes)
        room = model.pool_tokens(target, size.hardware, drafter)
        yield (
            *(target.name, _short(drafter), f"{own:,.0f}", _part(share)),
            f"{drafter.memory_bytes(target) / 1e9:.2f}",
            *(f"{room:,.0f}", f"{room / bare:.3f}"),
        )


def full_pool() -> str:
    """Tokens per second with as many requests as the pool holds."""
    contexts = (8 * K, 32 * K)
    head = (
        *("Target", "Drafter"),
        *(
            f"{_tokens(context)}: {what}"
            for context in contexts
            for what in ("requests", "tokens/s")
        ),
    )
    rows = []
    for size in SIZES:
        for name, drafter, length in [("none", None, 1.0), *cases(size)]:
            cells = [full(size, drafter, length, context) for context in contexts]
            rows.append((size.target.name, name, *(c for cell in cells for c in cell)))
    return table(head, rows)


def full(
    size: Size, drafter: Drafter | None, length: float, context: int
) -> tuple[str, str]:
    """How many requests of ``context`` tokens fit, and their tokens per second."""
    target, hardware = size.target, size.hardware
    batch = int(model.pool_tokens(target, hardware, drafter) // context)
    point = Point(batch, context)
    seconds = model.target_seconds(target, hardware, 1, point)
    if drafter is not None:
        seconds *= model.break_even(target, hardware, drafter, point)
    return str(batch), f"{batch * length / seconds:,.0f}"


def prefill() -> str:
    """Time to fill the drafter's own cache with a prompt."""
    head = ("Target", "Prompt", "The target's own", *PREFILLED)
    rows = [
        (size.target.name, _tokens(prompt), *_prefill(size, prompt))
        for size in SIZES
        for prompt in (8 * K, 32 * K)
    ]
    return table(head, rows)


PREFILLED = ("EAGLE-3", "DFlash", "DSpark", "LongSpark", "ours")


def _prefill(size: Size, prompt: int) -> Iterable[str]:
    rate = size.hardware.flops * size.hardware.flops_fraction
    whole = model.prefill_flops(size.target, prompt)
    yield f"{whole / rate * 1e3:,.0f} ms"
    for drafter in drafters(size)[: len(PREFILLED)]:
        extra = model.extra_prefill_flops(size.target, drafter, prompt)
        part = f"{extra / rate * 1e3:.0f} ms ({_part(extra / whole)})"
        yield part if extra else "0"


BOUND = (
    "own:31",
    "own:20,27,31",
    "shared:0-1,own:20,27,31",
    "shared:0-2,own:12,20,27,31",
)


def layers() -> str:
    """Break-even of our drafter with fewer layers, at 8B."""
    size = SIZES[1]
    head = ("Layers, k = 7", "Reads per token of context", *map(_where, POINTS))
    rows = []
    for spec, window in [*((spec, None) for spec in BOUND), (BOUND[-1], WINDOW)]:
        drafter = size._replace(layers=spec).ours(7)
        name = f"`{spec}`"
        if window is not None:
            drafter = replace(drafter, window=most_read(window, 7))
            name += f", `prefix_window` {window:,}"
        read = drafter.kv_layers * size.target.kv_layer_bytes
        even = [
            model.break_even(size.target, size.hardware, drafter, p) for p in POINTS
        ]
        rows.append((name, f"{read:,.0f} bytes", *(f"{e:.2f}" for e in even)))
    return table(head, rows)


def lengths() -> str:
    """Speed-up of our drafter with shorter drafts, at 8B and a context of 1K."""
    hoped = PUBLISHED_AL["LongSpark"]
    rows = []
    for k in range(1, 8):
        length = model.acceptance_cut(hoped, 7, k)
        speeds = [
            _speed(SIZES[1], SIZES[1].ours(k), length, Point(batch, K))
            for batch in BATCHES
        ]
        rows.append((str(k), f"{length:.2f}", *speeds))
    return table(("k", "AL", *(_where(Point(b, K)) for b in BATCHES)), rows)


# One per drafter in the left plot; the right one has dashes for what goes with it.
STYLES = ("C0.-", "C1.-", "C2.-", "C3.-", "C4.-")


def plot() -> None:
    """Cost of a draft over context, and predicted speed-up over batch, at 8B."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = SIZES[1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    contexts = [K * 2**i for i in range(8)]
    for drafter in (d for d in drafters(size) if d.name != "DSpark"):  # as DFlash
        if drafter.layers < size.target.layers:
            cost = [draft_cost(size, drafter, Point(2, c)) for c in contexts]
            left.plot(contexts, cost, STYLES[len(left.lines)], label=name_of(drafter))
    left.set_xscale("log", base=2)
    left.set_xticks(contexts, [_tokens(c) for c in contexts])
    left.set(xlabel="context (2 requests)", ylabel="cost of a draft, in decoding steps")
    batches = [2**i for i in range(9)]
    order = (*STYLES[:2], "C1.--", *STYLES[2:], "C4.--")
    for (name, drafter, length), style in zip(cases(size), order, strict=True):
        speeds = [speed_at(size, drafter, length, Point(b, K)) for b in batches]
        right.plot(batches, speeds, style, label=name)
    right.set_xscale("log", base=2)
    right.set_xticks(batches, [str(b) for b in batches])
    right.axhline(1, color="gray", linewidth=0.8)
    right.set(xlabel="requests (context 1K)", ylabel="predicted speed-up")
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    figure.suptitle("8B on one H100, on paper: assumptions, nothing measured")
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)


def _title(size: Size) -> str:
    layers = len(model.parse_layers(size.layers, size.target.layers))
    return (
        f"**{size.target.name}** ({size.target.layers} layers, on {size.hardware.name};"
        f" ours: {layers} layers, `{size.layers}`)"
    )


def name_of(drafter: Drafter) -> str:
    """As the tables of times have it."""
    if drafter.name != "ours":
        return drafter.name
    whole = "" if drafter.own_layers else " `shared:all`"
    return f"ours{whole}, k = {drafter.k}"


def _short(drafter: Drafter) -> str:
    ours = "ours" if drafter.own_layers else "ours, `shared:all`"
    return ours if drafter.name == "ours" else drafter.name


def _where(point: Point) -> str:
    return f"{point.batch} x {_tokens(point.context)}"


def _tokens(count: int) -> str:
    return f"{count // K}K"


def _part(part: float) -> str:
    return f"{part * 100:.1f} %"


def _signed(part: float) -> str:
    return f"{part * 100:+.0f} %"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"


MAKERS: dict[str, Callable[[], str]] = {
    "fit": fitted,
    "check": checked,
    "long check": checked_long,
    "speed-up": speed_ups,
    "cost": costs,
    "needed": needed,
    "memory": memory,
    "full pool": full_pool,
    "prefill": prefill,
    "layers": layers,
    "lengths": lengths,
}
PARTS = [Part(f"scaling, {name}", PAGE, make) for name, make in MAKERS.items()]


if __name__ == "__main__":
    sys.exit(main())
