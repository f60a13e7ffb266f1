# SPDX-License-Identifier: Apache-2.0
"""The cost model: its properties, its fit, and what docs/scaling.md says of it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from tools import cost_model as model
from tools import scaling
from tools.cost_model import H100, LLAMA_8B, Drafter, Hardware, Point
from vllm_mtp.drafter.checkpoint import read_config
from vllm_mtp.drafter.cost import draft_cost
from vllm_mtp.installed import installed_folder
from vllm_mtp.sharing.card import layers_text

SIZE = scaling.SIZES[1]
DRAFTERS = scaling.drafters(SIZE)
EAGLE3, DFLASH, DSPARK, LONGSPARK, OURS, OURS_4, SHARED = DRAFTERS
K = scaling.K
VARIANTS = [
    H100,
    replace(H100, overlap=1),
    replace(H100, flops_fraction=0.6),
    replace(H100, overhead=1e-3),
]
each_drafter = pytest.mark.parametrize("drafter", DRAFTERS, ids=scaling.name_of)
each_variant = pytest.mark.parametrize("hardware", VARIANTS)


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def at(size: str) -> scaling.Size:
    return next(s for s in scaling.SIZES if s.target.name == size)


def test_sizes_are_those_of_the_models() -> None:
    sizes = [s.target.memory_bytes / 2e9 for s in scaling.SIZES]
    assert sizes == pytest.approx([1.236, 8.03, 70.55], rel=1e-3)
    assert model.QWEN3_8B.layers * model.QWEN3_8B.kv_layer_bytes == 147_456
    assert model.SMOLLM2_135M.memory_bytes / 4e6 == pytest.approx(134.5, rel=1e-3)


def test_drafters_are_as_large_as_their_authors_say() -> None:
    longspark = model.longspark(model.QWEN3_8B, 7)
    assert longspark.memory_bytes(model.QWEN3_8B) / 2e9 == pytest.approx(
        1.194, rel=0.01
    )
    assert model.eagle3(model.QWEN3_8B, 7).own_kv_bytes(model.QWEN3_8B) == 4096
    # 640 MiB at 32K tokens.
    dspark = model.dspark(model.QWEN3_8B, 7).own_kv_bytes(model.QWEN3_8B)
    assert dspark * 32 * K == 640 * 2**20


@pytest.mark.parametrize("name", ["cheap", "shared"])
def test_ours_reads_what_inspect_counts(name: str) -> None:
    """Norms, placeholders, biases and LoRA, which the model leaves out, are no more
    than the rest."""
    folder = installed_folder(name)
    config, target = read_config(folder), model.SMOLLM2_135M
    cost = draft_cost(config)
    drafter = model.ours(
        target,
        layers_text(config),
        config.num_speculative_tokens,
        config.draft_vocab_size or target.vocab,
        bridges=name == "cheap",
        markov_rank=config.markov.rank if config.markov else 0,
    )
    (work,) = model.draft_work(target, drafter, Point(1, 0))
    lora = sum(
        math.prod(shape)
        for name, shape in tensor_shapes(folder).items()
        if ".lora." in name
    )
    read = (work.weights + work.head) / target.weight_bytes
    assert read == pytest.approx(cost.draft_parameters - lora, rel=1e-3)
    whole = target.layers * target.layer_weights + target.head_weights
    assert whole == pytest.approx(cost.target_parameters, rel=1e-3)
    kept = drafter.stored_weights + drafter.extra_weights
    kept += drafter.own_layers * target.layer_weights
    assert kept == pytest.approx(cost.drafter_parameters - lora, rel=1e-3)


def test_a_table_that_is_looked_up_is_not_read() -> None:
    """By hand: [vocabulary, rank] is kept, the gate and [rank, output] are read."""
    found = LLAMA_8B.markov(2, 10)
    assert found == (128_256 * 2, 4096 * 2 + 2 + 2 * 10)
    with_one, without = (
        model.ours(LLAMA_8B, "own:31", 4, 10, markov_rank=rank) for rank in (2, 0)
    )
    assert with_one.stored_weights - without.stored_weights == found.looked_up
    assert with_one.extra_weights - without.extra_weights == found.read


def test_ours_keeps_nothing_per_token() -> None:
    for drafter in (OURS, OURS_4, SHARED):
        assert drafter.own_kv_bytes(LLAMA_8B) == drafter.state_bytes == 0
        assert model.extra_prefill_flops(LLAMA_8B, drafter, 8 * K) == 0
    assert SHARED.own_layers == 0


@each_variant
@each_drafter
def test_time_grows_with_requests_and_context(
    drafter: Drafter, hardware: Hardware
) -> None:
    def draft(*where: int) -> float:
        return model.draft_seconds(LLAMA_8B, hardware, drafter, Point(*where))

    def step(rows: int, *where: int) -> float:
        return model.target_seconds(LLAMA_8B, hardware, rows, Point(*where))

    assert draft(1, K) < draft(2, K) or hardware.overlap
    assert draft(1, K) <= draft(2, K) < draft(1000, K)
    # A window is full at 1K, so that more context costs nothing.
    grows = draft(8, K) < draft(8, 32 * K)
    assert grows == (drafter.window is None)
    assert step(1, 1, K) < step(1, 2, K) < step(1, 2, 2 * K)
    assert step(1, 64, K) <= step(8, 64, K) < step(64, 64, K)


@each_variant
@each_drafter
def test_the_break_even_length_gives_a_speed_up_of_one(
    drafter: Drafter, hardware: Hardware
) -> None:
    for point in scaling.POINTS:
        even = model.break_even(LLAMA_8B, hardware, drafter, point)
        assert even > 1
        speed = model.speed_up(LLAMA_8B, hardware, drafter, point, even)
        assert speed == pytest.approx(1)
        assert model.speed_up(LLAMA_8B, hardware, drafter, point, even + 1) > 1


def test_a_draft_by_the_whole_target_costs_a_target_step() -> None:
    # The Markov correction is for the positions behind the first.
    alone = replace(SHARED, k=1, first_rows=1, extra_weights=0)
    for point in scaling.POINTS:
        draft = model.draft_seconds(LLAMA_8B, H100, alone, point)
        assert draft == model.target_seconds(LLAMA_8B, H100, 1, point)


def test_a_chain_pays_for_each_forward() -> None:
    slow = replace(H100, overhead=1.0)
    for drafter, forwards in ((EAGLE3, 7), (DFLASH, 1), (OURS, 1)):
        seconds = model.draft_seconds(LLAMA_8B, slow, drafter, Point(1, K))
        assert seconds == pytest.approx(forwards, abs=0.1)


def test_overlap_takes_the_longer_time() -> None:
    work = model.Work(weights=3.0, kv=0.0, head=1.0, flops=10.0, layers=2)
    plain = Hardware("", bandwidth=2, flops=10, overhead=5, layer_overhead=0.5)
    assert plain.seconds(work) == 2 + 1 + 5 + 1
    assert replace(plain, overlap=1).seconds(work) == 2 + 5 + 1


def test_own_cache_takes_room_for_requests() -> None:
    def room(drafter: Drafter | None) -> float:
        return model.pool_tokens(LLAMA_8B, H100, drafter)

    assert room(None) > room(SHARED) > room(OURS) > room(DFLASH) > room(DSPARK)
    small = replace(H100, memory=1e9)
    assert model.pool_tokens(LLAMA_8B, small, None) == 0


def test_acceptance_at_a_constant_rate() -> None:
    for rate in (0.0, 0.3, 0.83, 1.0):
        length = model.acceptance_length_of(rate, 7)
        assert model.acceptance_rate(length, 7) == pytest.approx(rate, abs=1e-9)
    assert model.acceptance_cut(4.78, 7, 7) == pytest.approx(4.78)
    assert 1 < model.acceptance_cut(4.78, 7, 1) < 2


def test_the_fit_gives_what_was_measured() -> None:
    """Within 17 %; single figures drift by 10 % from run to run."""
    fit = model.fit(model.MEASURED)
    assert fit.worst < 0.17
    assert 5e9 < fit.hardware.bandwidth < 12e9
    assert 0.3 * model.GEMM_FLOPS < fit.hardware.flops < model.GEMM_FLOPS
    assert 0 < fit.hardware.overhead < 5e-3
    # Better than the roofline, which is why the times are added.
    assert fit.worst < model.fit(model.MEASURED, overlap=True).worst


def test_the_fit_finds_the_constants_behind_made_up_steps() -> None:
    true = Hardware("", bandwidth=7e9, flops=60e9, overhead=3e-3)
    steps = [replace(s, seconds=true.seconds(s.work)) for s in model.MEASURED]
    found = model.fit(steps)
    assert found.worst < 1e-9
    assert found.hardware.bandwidth == pytest.approx(true.bandwidth)
    assert found.hardware.flops == pytest.approx(true.flops)
    assert found.hardware.overhead == pytest.approx(true.overhead)


def test_parts_of_a_measured_step_are_within_the_whole() -> None:
    for step in model.MEASURED:
        if step.layers is not None and step.head is not None:
            assert 0.95 * step.seconds < step.layers + step.head < step.seconds


def test_the_page_is_up_to_date() -> None:
    page = scaling.PAGE.read_text("utf-8")
    assert scaling.renewed(page) == page, "run python -m tools.scaling"


def test_the_page_says_how_far_off_the_fit_is() -> None:
    core, target = model.fit(model.MEASURED).hardware, model.SMOLLM2_135M
    cheap = model.ours(target, model.CHEAP, 4, 16_384)
    shared = model.ours(target, "shared:all", 4, target.vocab, bridges=False)
    found = [
        model.speed_up(target, core, cheap, Point(1, 100), 2.04),
        model.speed_up(target, core, shared, Point(4, 100), 2.967),
    ]
    assert found == pytest.approx([1.20, 0.77], abs=0.01)


def test_published_speed_ups_are_met_within_half() -> None:
    found = scaling.ratios(H100)
    assert 0.95 < min(found) < max(found) < 1.5


@each_variant
def test_what_the_page_says_of_long_contexts(hardware: Hardware) -> None:
    """Reading the target's cache costs as much as reading one's own."""
    where = Point(2, 128 * K)

    def draft(drafter: Drafter) -> float:
        return model.draft_seconds(LLAMA_8B, hardware, drafter, where)

    assert draft(LONGSPARK) < draft(DFLASH) < draft(OURS) < draft(EAGLE3)


def test_the_milliseconds_on_the_page() -> None:
    def draft(drafter: Drafter, batch: int, context: int) -> float:
        where = Point(batch, context)
        return 1e3 * model.draft_seconds(LLAMA_8B, H100, drafter, where)

    found = [draft(d, 2, 128 * K) for d in (OURS, DFLASH, LONGSPARK)]
    assert found == pytest.approx([5.3, 4.3, 2.0], abs=0.06)
    rate = H100.flops * H100.flops_fraction
    again = model.prefill_flops(LLAMA_8B, 1648) / rate
    assert again == pytest.approx(60e-3, rel=0.02)
    qwen = model.QWEN3_8B
    published = [
        model.draft_seconds(qwen, H100, model.longspark(qwen, 7), where)
        for where in (Point(8, 32 * K), Point(32, 2 * K))
    ]
    assert published == pytest.approx([2.3e-3, 3.9e-3], abs=0.06e-3)


@each_variant
@pytest.mark.parametrize("name", ["1B", "8B", "70B"])
def test_what_the_page_says_of_many_short_requests(
    name: str, hardware: Hardware
) -> None:
    size = at(name)
    hardware = replace(
        hardware,
        bandwidth=size.hardware.bandwidth,
        flops=size.hardware.flops,
        layer_overhead=size.hardware.layer_overhead,
    )
    size = size._replace(hardware=hardware)
    few, many = Point(1, K), Point(128, K)
    for _, drafter, length in scaling.cases(size):
        if drafter.passes == 1:
            speeds = [scaling.speed_at(size, drafter, length, p) for p in (few, many)]
            assert speeds[0] > speeds[1]


def test_what_the_page_says_of_the_measured_acceptance() -> None:
    """It is a loss with many short requests, and behind the peers nearly everywhere."""
    for size in scaling.SIZES:
        *peers, (_, *measured) = scaling.cases(size)
        assert scaling.speed_at(size, *measured, Point(128, K)) < 1
        for point in scaling.POINTS:
            own = scaling.speed_at(size, *measured, point)
            ahead = {
                drafter.name
                for _, drafter, length in peers[:4]
                if scaling.speed_at(size, drafter, length, point) > own
            }
            missing = set(scaling.PUBLISHED_AL) - ahead
            assert missing <= ({"EAGLE-3"} if size.target.name == "1B" else set())


def test_what_the_page_says_of_a_full_pool() -> None:
    ours, dspark = [], []
    for name in ("1B", "8B"):
        cases = scaling.cases(at(name))
        for found, (_, drafter, length) in ((dspark, cases[2]), (ours, cases[4])):
            found.append(scaling.full(at(name), drafter, length, 8 * K))
    assert [requests for requests, _ in ours] == ["257", "49"]
    assert [requests for requests, _ in dspark] == ["195", "42"]
    rates = [
        float(a.replace(",", "")) / float(b.replace(",", ""))
        for (_, a), (_, b) in zip(ours, dspark, strict=True)
    ]
    assert rates == pytest.approx([1.05, 0.95], abs=0.006)
