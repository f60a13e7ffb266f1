# SPDX-License-Identifier: Apache-2.0
"""Spans that the drafter drafts itself, and what it learns of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.auto import AutoModelForCausalLM

from checkpoints_spec.goldens import fill_weights
from tests.tiny_answers import MakeArguments
from tests.tiny_targets import VOCAB_SIZE, make_tiny
from vllm_mtp.drafter.heads import pick_greedy, pick_greedy_with_scores
from vllm_mtp.drafter.layout import IGNORE_LABEL
from vllm_mtp.errors import MTPError
from vllm_mtp.evaluation.offline import greedy_continuation
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.new_drafter import DrafterOptions, new_drafter
from vllm_mtp.torch_host.texts import draft_texts, forward_texts
from vllm_mtp.training.loss_module import LossModule, LossPlan
from vllm_mtp.training.loss_vocabulary import LossVocabulary
from vllm_mtp.training.objective import Objective
from vllm_mtp.training.walk import draft_greedily

K = 3
LORA: dict[str, Any] = {"lora_rank": 4, "lora_modules": ["q_proj", "v_proj", "up_proj"]}
KINDS: dict[str, dict[str, Any]] = {
    "whole target": {"layers": "shared:all", **LORA, "markov_rank": 4},
    "noise": {"layers": "shared:all", **LORA, "placeholder_kind": "noise"},
    "own": {"layers": "own:3", "boundary_hidden": "first"},
    "reduced": {"layers": "shared:0,own:2", "draft_vocab_size": 200, "markov_rank": 4},
    "chain": {"layers": "own:3", "chain": True},
    "heads": {"layers": "mlp:1", "input": "boundary", "lm_head": "own"},
}


def host_of(folder: Path) -> HFTarget:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return HFTarget(model.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def host(tiny_llama: Path) -> HFTarget:
    return host_of(tiny_llama)


def text_of(host: HFTarget, size: int = 24, index: int = 0) -> dict[str, Any]:
    """A prompt of 4 tokens and the target's greedy answer."""
    prompt = torch.arange(4) * 37 + 11 * index
    answer = greedy_continuation(host, host.encode(prompt), 4, size)
    tokens = torch.cat([prompt, answer])
    return {"index": index, "input_ids": tokens, "loss_spans": [[4, len(tokens)]]}


def module_of(
    host: HFTarget,
    folder: Path,
    design: dict[str, Any],
    weight: float = 1.0,
    candidates: LossVocabulary | None = None,
    fill: bool = True,
    **plan: Any,
) -> LossModule:
    options = {"dtype": "float32"} | design
    layers, size = options.pop("layers"), options.get("draft_vocab_size")
    tokens = range(1, 2 * size, 2) if size else None
    drafter = new_drafter(folder, layers, K, DrafterOptions(**options), tokens)
    if fill:
        fill_weights(torch.nn.ModuleList(drafter.layers), 0.1, salt="spans ")
        if drafter.markov is not None:
            fill_weights(drafter.markov, 0.3, salt="spans ")
    plan = {"anchors_per_text": 8} | plan
    return LossModule(
        drafter.float(), host, LossPlan(on_policy_weight=weight, **plan), candidates
    )


@pytest.mark.parametrize("target", ["tiny_llama", "tiny_qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_target_reads_what_was_drafted(
    target: str, kind: str, request: pytest.FixtureRequest
) -> None:
    """As if prefix, anchor and span were one text; and it is that which is learnt."""
    folder: Path = request.getfixturevalue(target)
    host = host_of(folder)
    module = module_of(host, folder, KINDS[kind])
    texts = [module.blocks(text_of(host, index=i), step=0) for i in range(2)]
    with torch.no_grad():
        hidden = forward_texts(module.bound, texts, K)
        assert module.verifier is not None
        tokens = draft_greedily(module.bound, texts, hidden, K)
        spans = module.verifier.spans(texts, tokens)
        drafted, scores = draft_texts(module.bound, texts, K, pick_greedy_with_scores)
        assert spans.tokens.equal(drafted)
        row = 0
        for text in texts:
            for length in text.prefix_lens.tolist():
                known = text.token_ids[: length + 1]
                whole = torch.cat([known, spans.tokens[row]])
                expected = host.encode(whole).hidden[length : length + K]
                torch.testing.assert_close(
                    spans.hidden[row], expected, atol=1e-4, rtol=1e-4
                )
                said = host.logits(expected).argmax(-1)
                assert spans.said[row].equal(said)
                row += 1
        # Labels stand where the texts have some.
        first = int(module.first_position_is_exact)
        valid = torch.cat([text.labels(K) for text in texts])[:, first:] != IGNORE_LABEL
        said = spans.said[:, first:]
        vocab = module.drafter.draft_vocab
        can = valid
        if vocab is not None:
            columns = LossVocabulary(vocab.token_ids, VOCAB_SIZE).columns(said)
            can, said = valid & (columns != IGNORE_LABEL), columns.clamp(min=0)
        assert scores is not None
        losses = F.cross_entropy(
            scores[:, first:].flatten(0, 1), said.flatten(), reduction="none"
        ).view(said.shape)
        wanted = ((losses * can).sum(0) / valid.sum(0)).mean()
        found = module.loss_of(texts)
    torch.testing.assert_close(found["loss"], wanted, atol=1e-4, rtol=1e-4)
    assert set(found) == {"loss", "on_policy_ce"}
    assert can.sum() > 4


@pytest.mark.parametrize("size", [None, 64], ids=["all tokens", "some"])
@pytest.mark.parametrize(
    "objective",
    [Objective(), Objective(0.5, 0.5, 1.0, 8, 2.0), Objective(0.0, 0.0, 1.0, 0)],
    ids=["ce", "all", "tv"],
)
def test_where_all_drafts_are_right_it_is_the_text_that_is_learnt(
    objective: Objective, size: int | None, host: HFTarget, tiny_llama: Path
) -> None:
    """The target itself drafts, by being given the true tokens as placeholders."""
    design = {"layers": "shared:all", **LORA}
    losses = []
    for weight in (0.0, 0.3, 1.0):
        candidates = LossVocabulary(torch.arange(size), VOCAB_SIZE) if size else None
        module = module_of(
            host, tiny_llama, design, weight, candidates, False, objective=objective
        )
        text = text_of(host)
        blocks = module.blocks(text, step=0)
        true = blocks.labels(K)[:, :-1].clamp(min=0)
        blocks = blocks._replace(noise_ids=true)
        losses.append(module.loss_of([blocks])["loss"])
    assert losses[0] > 0
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], atol=1e-5, rtol=1e-5)


def test_the_text_has_the_rest_of_the_weight(host: HFTarget, tiny_llama: Path) -> None:
    module = [
        module_of(host, tiny_llama, KINDS["own"], weight) for weight in (0.0, 0.25, 1.0)
    ]
    blocks = [one.blocks(text_of(host), step=0) for one in module]
    none, some, all_of_it = (
        one.loss_of([b])["loss"] for one, b in zip(module, blocks, strict=True)
    )
    assert not none.isclose(all_of_it)
    torch.testing.assert_close(some, 0.75 * none + 0.25 * all_of_it)


@pytest.mark.parametrize(
    ("kind", "weight", "count"),
    [("chain", 1.0, 1), ("chain", 0.5, 2), ("own", 1.0, 1), ("own", 0.5, 1)],
)
def test_no_forward_runs_that_nobody_reads(
    kind: str,
    weight: float,
    count: int,
    host: HFTarget,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of a block are the same behind text and spans; those of a chain are not."""
    forwards = []

    def forward(*inputs: Any) -> torch.Tensor:
        forwards.append(1)
        return forward_texts(*inputs)

    monkeypatch.setattr("vllm_mtp.training.loss_module.forward_texts", forward)
    module = module_of(host, tiny_llama, KINDS[kind], weight)
    module.loss_of([module.blocks(text_of(host), step=0)])["loss"].backward()
    assert len(forwards) == count
    grads = [p.grad for p in module.drafter.parameters() if p.grad is not None]
    assert any(grad.abs().sum() for grad in grads)


@pytest.mark.parametrize("kind", ["whole target", "reduced", "chain"])
@pytest.mark.parametrize("objective", [Objective(), Objective(0.5, 0.5, 0.5, 8)])
def test_parts_of_a_step_sum_up_to_all_of_it(
    kind: str, objective: Objective, host: HFTarget, tiny_llama: Path
) -> None:
    """Gradients too; layers that are computed anew in the backward have the same."""
    found = []
    for parts, again in ((1, False), (2, True)):
        candidates = None
        if kind != "reduced":
            candidates = LossVocabulary(torch.arange(100, 200), VOCAB_SIZE)
        module = module_of(
            host, tiny_llama, KINDS[kind], 0.5, candidates, objective=objective
        )
        if again:
            module.gradient_checkpointing_enable()
        # The second answer ends within blocks.
        texts = [text_of(host, 24, 0), text_of(host, 5, 1)]
        whole = module.labels_of_step(texts, 0, lambda counts: counts)
        batches = [texts] if parts == 1 else [[text] for text in texts]
        losses = [module(batch, step=0, whole=whole) for batch in batches]
        sum(loss["loss"] for loss in losses).backward()  # type: ignore[union-attr]
        sums = {key: sum(loss[key].detach() for loss in losses) for key in losses[0]}
        weights = module.drafter.named_parameters()
        found.append((sums, {n: p.grad for n, p in weights if p.grad is not None}))
    (sums, gradients), (of_parts, of_part_gradients) = found
    torch.testing.assert_close(of_parts, sums, atol=1e-5, rtol=1e-4)
    assert len(gradients) > 2
    torch.testing.assert_close(of_part_gradients, gradients, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["whole target", "own", "chain"])
def test_more_drafts_are_accepted_than_without(
    kind: str, host: HFTarget, tiny_llama: Path
) -> None:
    design = KINDS[kind]
    module = module_of(host, tiny_llama, design, fill=False, anchors_per_text=32)
    text = text_of(host)

    def accepted() -> float:
        blocks = module.blocks(text, step=0)
        with torch.no_grad():
            drafted, _ = draft_texts(module.bound, [blocks], K, pick_greedy)
        return float((drafted == blocks.labels(K)).cumprod(1).sum(1).float().mean())

    before = accepted()
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for step in range(60):
        optimizer.zero_grad()
        module([text], step)["loss"].backward()
        optimizer.step()
    assert accepted() > before + 0.5


def test_a_curriculum_drafts_as_far_as_it_teaches(
    arguments: MakeArguments, host: HFTarget, tiny_llama: Path
) -> None:
    args = arguments(
        layers="own:3", on_policy_weight=0.5, curriculum_steps=5, ce_start_steps=2,
        tv_weight=1.0,
    )  # fmt: skip
    drafter = new_drafter(tiny_llama, "own:3", K, DrafterOptions(dtype="float32"))
    module = LossModule(drafter, host, args.plan())
    assert module.cached_layers == (0, 1, 2, 3)
    seen = [set(module([text_of(host)], step)) for step in (0, 2, 5)]
    assert seen[0] == {"loss", "ce", "on_policy_ce"}
    assert seen[1] == seen[2] == seen[0] | {"tv", "on_policy_tv"}


def test_without_it_only_the_drafters_layers_are_kept(
    host: HFTarget, tiny_llama: Path
) -> None:
    module = module_of(host, tiny_llama, KINDS["own"], 0.0)
    assert module.verifier is None
    assert module.cached_layers == (3,)


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_the_weight_is_a_part(weight: float, arguments: MakeArguments) -> None:
    with pytest.raises(MTPError, match="on_policy_weight: got .*from 0 .none. to 1"):
        arguments(layers="own:3", on_policy_weight=weight)


def test_a_target_with_layers_without_a_cache_is_refused(tmp_path: Path) -> None:
    folder = make_tiny("qwen3_next", tmp_path / "target")
    options = DrafterOptions(dtype="float32", own_init="random")
    drafter = new_drafter(folder, "own:3", K, options)
    host = host_of(folder)
    with pytest.raises(MTPError, match="on_policy_weight: the target has to") as caught:
        LossModule(drafter, host, LossPlan(on_policy_weight=0.5))
    assert "\n" not in str(caught.value)
