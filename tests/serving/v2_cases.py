# SPDX-License-Identifier: Apache-2.0
"""Cases for the V2 runner alone; `test_v2.py` runs them in a process of its own."""

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.serving.conftest import SHAPES
from tests.serving.engines import (
    ON_V2,
    Run,
    bound_drafter_of,
    engine,
    generate,
    runner_of,
)
from tests.serving.lossless.matrix import Runs
from tests.serving.lossless.plays import thinking
from tests.serving.lossless.rows import Row
from tests.serving.lossless.subjects import shorter_for_v2, tiny_chain_subject
from tests.serving.played_graphs import play_graphs
from tests.serving.test_parity import record_steps
from vllm_mtp.drafter.layout import PAD_SLOT
from vllm_mtp.serving import v2

pytestmark = pytest.mark.skipif(not ON_V2, reason="needs test_v2.py's environment")

PROMPTS = [[(7 * i + j) % 512 for i in range(20 + j)] for j in range(3)]
# As long as it takes for the drafters with a window to skip tokens.
UNEQUAL_PROMPTS = [
    [(7 * i + j) % 512 for i in range(n)] for j, n in enumerate((450, 310, 20))
]
SLOW = pytest.mark.slow


def spec_for(folder: Path, **settings: object) -> dict[str, object]:
    return {"method": "mtp_placeholder", "model": str(folder), **settings}


def test_it_is_the_v2_runner_with_our_speculator(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vllm_mtp.serving.v2 import MTPPlaceholderSpeculator

    with engine(tiny_targets["llama"], spec_for(tiny_drafter("llama", "own-1"))) as llm:
        assert isinstance(runner_of(llm), GPUModelRunner)
        assert type(runner_of(llm).speculator) is MTPPlaceholderSpeculator
        assert runner_of(llm).speculator.draft_attn_layer_names == set()


def test_a_drafter_that_is_the_target_is_accepted_when_sampling(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    spec = spec_for(
        tiny_drafter("llama", "shared-1"), draft_sample_method="probabilistic"
    )
    with engine(tiny_targets["llama"], spec) as llm:
        run = generate(llm, PROMPTS, 12, temperature=1.0, seed=3)
    assert run.counts.accepted_per_position[0] == run.counts.drafts > 10


def test_block_verification_accepts_them_as_well(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    spec = spec_for(
        tiny_drafter("llama", "shared-4"),
        draft_sample_method="probabilistic",
        rejection_sample_method="block",
    )
    with engine(tiny_targets["llama"]) as llm:
        alone = generate(llm, PROMPTS, 8)
    with engine(tiny_targets["llama"], spec) as llm:
        assert runner_of(llm).rejection_sampler.use_block_verification
        run = generate(llm, PROMPTS, 8, temperature=1.0, seed=3)
        greedy = generate(llm, PROMPTS, 8)
    assert greedy.token_ids == alone.token_ids
    for counts in (run.counts, greedy.counts):
        assert counts.accepted_per_position[0] == counts.drafts > 10


@pytest.mark.parametrize("how", ["greedy", "probabilistic"])
def test_estimates_of_acceptance_learn_from_our_drafts(
    how: str,
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What adaptive verification goes by; vLLM has it with full CUDA graphs only.

    The drafter has a reduced vocabulary and a Markov correction: the estimate must be
    of the distribution that is drafted from."""
    from vllm.v1.worker.gpu.spec_decode.acceptance_estimator import (
        OnlineAcceptanceEstimator,
    )

    monkeypatch.setattr(OnlineAcceptanceEstimator, "REFIT_INTERVAL", 3)
    spec = spec_for(tiny_drafter("llama", "mixed"), draft_sample_method=how)
    with engine(tiny_targets["llama"], spec) as llm:
        speculator = runner_of(llm).speculator
        estimator = OnlineAcceptanceEstimator(
            speculator.max_num_reqs, speculator.num_speculative_steps, speculator.device
        )
        speculator.acceptance_estimator = estimator
        predict, seen = estimator.predict, []

        def watched(logits: Any, slots: Any, column: Any, *args: Any) -> None:
            seen.append((logits.clone(), slots.clone(), int(column)))
            predict(logits, slots, column, *args)
            best = logits.double().softmax(-1).amax(-1)
            expected = torch.log(best / (1 - best)).clamp(-40, 40)
            got = estimator.features[slots, int(column)].double()
            torch.testing.assert_close(got, expected, atol=1e-2, rtol=1e-2)

        monkeypatch.setattr(estimator, "predict", watched)
        run = generate(llm, PROMPTS, 10)
        slope, confidence = estimator.slope, speculator.draft_token_confidence_probs
    assert {column for *_, column in seen} == {0, 1, 2, 3}
    assert all(logits.shape[-1] == 512 for logits, *_ in seen)
    assert all(logits[:, 1::2].isneginf().all() for logits, *_ in seen)
    assert run.counts.drafts > 10
    assert estimator._refits > 1
    assert slope.item() != pytest.approx(0.5)
    used = confidence[: len(PROMPTS)]
    assert ((used > 0) & (used < 1)).all()


def test_draft_distributions_cover_the_targets_vocabulary(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    """Reduced vocabulary: the tokens that cannot be drafted have probability 0."""
    spec = spec_for(tiny_drafter("llama", "mixed"), draft_sample_method="probabilistic")
    with engine(tiny_targets["llama"], spec) as llm:
        run = generate(llm, PROMPTS, 12, temperature=1.0, seed=3)
        cached = runner_of(llm).speculator.draft_logits
    assert 0 < run.counts.accepted_tokens < run.counts.draft_tokens
    used = cached.flatten(1).ne(0).any(dim=1)  # rows of requests that drafted
    assert used.sum() == len(PROMPTS)
    finite = cached[used].isfinite()
    assert finite[:, :, ::2].all()  # `ALL_OPTIONS` drafts even token ids
    assert not finite[:, :, 1::2].any()


def test_a_limit_that_vllm_lowers_after_start_is_kept(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    """With ``max_model_len=-1`` vLLM fits the limit to the cache later on."""
    with engine(
        tiny_targets["llama"], spec_for(tiny_drafter("llama", "shared-4"))
    ) as llm:
        speculator = runner_of(llm).speculator
        speculator.vllm_config.model_config.max_model_len = 64
        # A block of its own: what the null block holds is nobody's.
        speculator.block_tables.input_block_tables[0][0] = 1
        batch = SimpleNamespace(
            num_reqs=1,
            seq_lens=torch.tensor([64]),
            query_start_loc=torch.tensor([0, 4]),
        )
        layout = speculator._lay_out(batch, torch.tensor([2]))
        speculator._stage(layout, torch.empty(0), dummy_run=False)
    buffers = speculator._buffers
    assert buffers.positions[0, :4].tolist() == [62, 63, 63, 63]
    slots = buffers.slots[0, 0]
    assert (slots[2:] == PAD_SLOT).all()
    assert (slots[:2] != PAD_SLOT).all()


def test_boundary_hidden_is_the_last_valid_tokens_after_rejections(
    tiny_targets: dict[str, Path], tiny_drafter: Callable[[str, str], Path]
) -> None:
    """The LM head on that row must give the anchor, rejections or not."""
    with engine(tiny_targets["llama"], spec_for(tiny_drafter("llama", "mixed"))) as llm:
        bound = bound_drafter_of(llm)
        forward, seen = bound.forward, []

        def recorded(anchors: Any, positions: Any, boundary: Any) -> Any:
            best = bound.target.logits(boundary).argmax(dim=-1)
            seen.append((anchors.clone(), best))
            return forward(anchors, positions, boundary)

        bound.forward = recorded
        run = generate(llm, PROMPTS, 16)
    assert run.counts.accepted_tokens < run.counts.draft_tokens
    assert len(seen) > 5
    for anchors, best in seen:
        assert anchors.tolist() == best.tolist()


# In pieces, and the second time some of them from the prefix cache.
IN_PIECES: dict[str, Any] = {"max_model_len": 512, "max_num_batched_tokens": 160}


@pytest.fixture(scope="module")
def alone(tiny_targets: dict[str, Path]) -> dict[int, Run]:
    """The target's own answers, by the number of prompts that are asked at once."""
    with engine(tiny_targets["llama"], **IN_PIECES) as llm:
        batches = (UNEQUAL_PROMPTS, UNEQUAL_PROMPTS[:1])
        return {len(batch): generate(llm, batch, 10) for batch in batches}


@pytest.mark.parametrize(
    "name",
    ["mixed", "mixed-windowed", *SHAPES, pytest.param("shared-4", marks=SLOW)],
)
def test_what_a_graph_would_hold_gives_the_same_drafts(
    name: str,
    alone: dict[int, Run],
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`_generate_draft` again and again with the objects of its capture: only the
    buffers differ from step to step, and the batch is padded. With graphs or without,
    the answers are the target's."""
    spec = spec_for(tiny_drafter("llama", name), enforce_eager=False)
    with engine(tiny_targets["llama"], spec, **IN_PIECES) as llm:
        speculator = runner_of(llm).speculator
        assert speculator._graphs is None  # vLLM captures nothing on a CPU
        batches = (UNEQUAL_PROMPTS, UNEQUAL_PROMPTS[:1], UNEQUAL_PROMPTS)
        eager = [generate(llm, batch, 10) for batch in batches]
        assert llm.reset_prefix_cache()
        played = play_graphs(speculator, num_reqs=(1, 2, 8), monkeypatch=monkeypatch)
        graphed = [generate(llm, batch, 10) for batch in batches]
        assert speculator.faults.failures == 0
    for one, other in zip(eager, graphed, strict=True):
        assert one.token_ids == alone[len(one.token_ids)].token_ids
        assert other.token_ids == one.token_ids
        assert other.counts == one.counts
        assert other.counts.accepted_tokens < other.counts.draft_tokens
    assert eager[0].chunked
    assert eager[2].prefix_hits
    if name == "chain":  # nearly the target, row after row
        assert all(eager[0].counts.accepted_per_position[:2])
    # One request in a graph for one, and three in a graph for eight.
    assert {(1, 1), (3, 8)} <= set(played)


def test_a_chains_rows_are_drawn_at_their_positions(
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each by the noise of its position, and what it was drawn from is kept there."""
    drawn: list[tuple[list[int], int]] = []
    sample = v2.gumbel_sample

    def watched(*args: Any, **kwargs: Any) -> Any:
        drawn.append((args[4].tolist(), int(kwargs["logits_cache_col"])))
        return sample(*args, **kwargs)

    monkeypatch.setattr(v2, "gumbel_sample", watched)
    spec = spec_for(tiny_drafter("llama", "chain"), draft_sample_method="probabilistic")
    with engine(tiny_targets["llama"], spec) as llm:
        speculator = runner_of(llm).speculator
        propose, steps = speculator.propose, record_steps(bound_drafter_of(llm))

        def proposed(batch: Any, *args: Any, **kwargs: Any) -> Any:
            before = len(steps)
            drafts = propose(batch, *args, **kwargs)
            if len(steps) == before:  # 0.33 asks for none that nobody can use
                return drafts
            slots = batch.idx_mapping[: batch.num_reqs].long()
            kept = speculator.draft_logits[slots]
            torch.testing.assert_close(kept, steps[-1]["logits"])
            assert drafts.equal(steps[-1]["tokens"])
            positions = steps[-1]["positions"].T.tolist()
            assert drawn[-4:] == list(zip(positions, range(4), strict=True))
            return drafts

        speculator.propose = proposed
        run = generate(llm, PROMPTS, 10, temperature=1.0, seed=3)
        assert speculator.faults.failures == 0
    assert len(steps) > 2
    assert all(run.counts.accepted_per_position[:2])


def test_the_gpu_run_counts_every_replay(
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`tools/gpu` tells by this whether drafts came from graphs."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools/gpu")
    gpu = importlib.import_module("engine")
    spec = spec_for(tiny_drafter("llama", "own-1"), enforce_eager=False)
    with engine(tiny_targets["llama"], spec) as llm:
        side = gpu.Side("own-1", llm)
        assert not side.has_draft_graphs
        without = side.answer(PROMPTS, 6)
        played = play_graphs(
            runner_of(llm).speculator, num_reqs=(4, 8), monkeypatch=monkeypatch
        )
        assert side.has_draft_graphs
        answers = side.answer(PROMPTS, 6)
        with side.without_draft_graphs():
            assert not side.has_draft_graphs
    assert side.failed_drafts == 0
    assert without.calls > 2
    assert without.replays.drafter == 0
    assert answers.replays.drafter == answers.calls == len(played) > 2
    assert answers.replays.target == 0


@pytest.mark.parametrize(
    ("enforce_eager", "mode", "support", "num_rows", "warning"),
    [
        (None, "FULL_AND_PIECEWISE", "ALWAYS", 4, None),
        (True, "FULL_AND_PIECEWISE", "ALWAYS", 4, None),
        (False, "NONE", "ALWAYS", 4, "cudagraph_mode is NONE"),
        (False, "PIECEWISE", "ALWAYS", 4, "cudagraph_mode is PIECEWISE"),
        (False, "FULL", "UNIFORM_SINGLE_TOKEN_DECODE", 4, "SomeBackend cannot be"),
        (False, "FULL", "NEVER", 4, "SomeBackend cannot be captured"),
        (False, "FULL", "NEVER", 1, "SomeBackend cannot be captured"),
    ],
)
def test_graphs_are_made_only_where_asked_for_and_possible(
    enforce_eager: bool | None,
    mode: str,
    support: str,
    num_rows: int,
    warning: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.worker.gpu.attn_utils import AttentionCGSupportInfo

    from vllm_mtp.serving.v2_graphs import draft_graphs

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    spec = SimpleNamespace(enforce_eager=enforce_eager, num_speculative_tokens=4)
    info = AttentionCGSupportInfo(AttentionCGSupport[support], "SomeBackend")
    config: Any = SimpleNamespace(speculative_config=spec)
    device = torch.device("cpu")
    assert draft_graphs(config, device, CUDAGraphMode[mode], info, num_rows) is None
    assert (warning or "") in caplog.text
    assert bool(caplog.text) == (warning is not None)


@pytest.mark.parametrize(
    ("support", "num_rows"), [("UNIFORM_BATCH", 4), ("UNIFORM_SINGLE_TOKEN_DECODE", 1)]
)
def test_a_chains_rows_ask_less_of_a_backend(
    support: str, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.worker.gpu.attn_utils import AttentionCGSupportInfo

    from vllm_mtp.serving import v2_graphs

    monkeypatch.setattr(v2_graphs, "CudaGraphManager", lambda *_, **given: given)
    spec = SimpleNamespace(enforce_eager=False, num_speculative_tokens=4)
    info = AttentionCGSupportInfo(AttentionCGSupport[support], "SomeBackend")
    config: Any = SimpleNamespace(speculative_config=spec)
    made: Any = v2_graphs.draft_graphs(
        config, torch.device("cpu"), CUDAGraphMode.FULL, info, num_rows
    )
    assert made == {"decode_query_len": num_rows}


@pytest.mark.slow
def test_thinking_ends_behind_the_targets_token(tmp_path: Path) -> None:
    """vLLM's V2 counts for each row of a step; on V1 a patch does."""
    subject = shorter_for_v2(tiny_chain_subject(tmp_path))
    row = Row("thinking budgets", thinking(None, max_tokens=16), "thinking")
    (result,) = Runs([row]).compared(subject, [row])
    assert not result.problems, "\n".join(result.problems)
    assert result.drafted.facts.counts.accepted_tokens > 10
