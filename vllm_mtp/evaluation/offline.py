# SPDX-License-Identifier: Apache-2.0
"""Acceptance of a drafter behind the target's own answers, without vLLM.

Behind a prefix of n tokens the anchor is token n, and position i (from 0) drafts token
n + 1 + i. An answer in the span [start, end) has the anchors start .. end - 2: decoding
samples token ``start`` after the prefill, and stops as soon as token ``end - 1`` is
there. Two measures are taken, both in vLLM's terms (see `vllm_mtp.metrics`):

* teacher-forced: one draft behind every anchor;
* simulated: one draft per decoding step. A step with a accepted drafts moves the
  anchor by a + 1 tokens, so what comes next depends on k: each k has its own walk.

vLLM counts all drafts of the last step, also those behind the token that ends the
answer (or behind ``max_tokens``), accepted or not, and only then cuts the text. What
the target would have said there is not in the text, so the target is asked: it goes on
greedily for up to k - 1 tokens.

The simulated counts are then those that vLLM counts for the same greedy answers, but
for this:

* logits of other kernels: tokens that nearly tie can change places, in the drafts and
  in the target's own continuation;
* the last steps before ``max_model_len``, which vLLM gives fewer drafts;
* preemption, after which a request takes one step without drafts;
* answers that were sampled (temperature above 0): the walk still takes a draft as
  accepted only where it is the sampled token.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, Literal

import torch
from pydantic import JsonValue, TypeAdapter, ValidationError

from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.heads import pick_greedy
from vllm_mtp.drafter.layout import anchors_of, block_labels
from vllm_mtp.errors import DataError, MTPError
from vllm_mtp.metrics import AcceptanceCounts, leading, mean_length
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.target_states import TargetStates
from vllm_mtp.torch_host.texts import TextBlocks, draft_texts, streams_of

# Blocks per forward. Their logits, 64 * k * vocabulary, are the largest tensor.
_BLOCKS = 64

DEFINITIONS = {
    "drafts": "drafting steps, the denominator of the acceptance by position",
    "draft_tokens": "drafts * k, the denominator of the acceptance rate",
    "accepted_per_position": "drafts whose first i tokens were accepted, i = 1 .. k",
    "acceptance_per_position": "accepted_per_position / drafts (unconditional)",
    "acceptance_length_by_k": (
        "1 + accepted tokens / drafts in decoding with k' = 1 .. k drafted tokens; the "
        "1 is the bonus token, which the target gives in every step"
    ),
    "teacher_forced": "a draft behind every token of the answers but the last",
    "teacher_forced_length_by_k": (
        "the same behind every token: no decoding, so no acceptance length"
    ),
    "simulated_by_k": (
        "a draft per step of greedy decoding with k' = 1 .. k drafted tokens, the last "
        "step counted whole, as vLLM does"
    ),
    "tokens": "the target's own tokens in the sequences",
}
"""What the numbers in ``evaluation.json`` are."""


@dataclass(frozen=True)
class CategoryResult:
    """Acceptance in some sequences; results of different sequences add.

    Attributes:
        sequences: Number of rows.
        tokens: The target's own tokens in them.
        teacher_forced: Drafts of k tokens behind every anchor.
        simulated_by_k: Decoding with 1, 2, .. k drafted tokens per step.
    """

    sequences: int
    tokens: int
    teacher_forced: AcceptanceCounts
    simulated_by_k: tuple[AcceptanceCounts, ...]

    @classmethod
    def nothing(cls, k: int) -> "CategoryResult":
        """No sequence at all, for sums."""
        return cls(0, 0, _counts((), k), tuple(_counts((), i + 1) for i in range(k)))

    @property
    def simulated(self) -> AcceptanceCounts:
        """Decoding with all k drafted tokens."""
        return self.simulated_by_k[-1]

    @property
    def teacher_forced_length(self) -> float:
        """1 + accepted tokens / drafts behind every token. Not the acceptance length,
        which is of decoding: there, more drafts stand where few are accepted."""
        return mean_length(self.teacher_forced)

    @property
    def teacher_forced_by_k(self) -> tuple[AcceptanceCounts, ...]:
        """Drafts of 1, 2, .. k tokens, as the starts of those of k tokens. In a
        bidirectional block shorter drafts are others."""
        drafts = self.teacher_forced.drafts
        positions = self.teacher_forced.accepted_per_position
        return tuple(
            AcceptanceCounts(drafts, drafts * k, positions[:k])
            for k in range(1, len(positions) + 1)
        )

    def __add__(self, other: "CategoryResult") -> "CategoryResult":
        pairs = zip(self.simulated_by_k, other.simulated_by_k, strict=True)
        return CategoryResult(
            self.sequences + other.sequences,
            self.tokens + other.tokens,
            self.teacher_forced + other.teacher_forced,
            tuple(a + b for a, b in pairs),
        )


@dataclass(frozen=True)
class OfflineResult:
    """Acceptance by category of prompts.

    Attributes:
        k: Drafted tokens per step.
        by_category: In the order of their names.
        settings: What was evaluated, for the reader.
    """

    k: int
    by_category: dict[str, CategoryResult]
    settings: dict[str, JsonValue] = field(default_factory=dict)
    format: Literal[1] = 1

    @property
    def total(self) -> CategoryResult:
        """All categories together."""
        return reduce(add, self.by_category.values(), CategoryResult.nothing(self.k))

    def to_json(self) -> str:
        """Counts, what follows from them, and what the names mean."""
        named = self.by_category.items()
        content = {
            "format": self.format,
            "k": self.k,
            "settings": self.settings,
            "definitions": DEFINITIONS,
            "total": _as_json(self.total),
            "by_category": {name: _as_json(result) for name, result in named},
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "OfflineResult":
        """Read what `to_json` gave; all that follows from the counts is left out.

        Raises:
            DataError: The text is something else.
        """
        try:
            return TypeAdapter(cls).validate_json(_with_todays_names(text))
        except ValidationError as error:
            raise DataError(
                f"not an evaluation that this version of vllm-mtp wrote ({error}); "
                "run `vllm-mtp eval` again"
            ) from None


def _with_todays_names(text: str | bytes) -> str | bytes:
    """What 0.1 wrote, which called a position of the block a place."""
    if isinstance(text, bytes):
        return text.replace(b'"accepted_per_place"', b'"accepted_per_position"')
    return text.replace('"accepted_per_place"', '"accepted_per_position"')


def _as_json(result: CategoryResult) -> dict[str, Any]:
    teacher_forced, simulated = result.teacher_forced_by_k, result.simulated_by_k
    return asdict(result) | {
        "derived": {
            "teacher_forced": _derived(teacher_forced, "teacher_forced_length_by_k"),
            "simulated": _derived(simulated, "acceptance_length_by_k"),
        }
    }


def _derived(by_k: Sequence[AcceptanceCounts], length: str) -> dict[str, Any]:
    return {
        "acceptance_per_position": by_k[-1].acceptance_per_position,
        "acceptance_rate": by_k[-1].acceptance_rate,
        length: [mean_length(counts) for counts in by_k],
    }


def evaluate_texts(
    bound: BoundDrafter,
    rows: Iterable[Mapping[str, Any]],
    k: int,
    max_anchors_per_span: int | None = None,
) -> OfflineResult:
    """Measure acceptance behind known answers.

    Args:
        bound: A drafter on an `HFTarget`.
        rows: With the columns ``category``, ``input_ids`` and ``loss_spans`` of
            `vllm_mtp.data.store`; gone through once.
        k: Tokens to draft; at most what the drafter was made for.
        max_anchors_per_span: Look only at this many tokens at the start of each
            answer. None for all.

    Raises:
        MTPError: k is not one that the drafter can draft.
        DataError: There is no row, no row with an anchor, or a row with a span that
            leaves its tokens.
    """
    results: dict[str, CategoryResult] = {}
    for name, found in evaluate_rows(bound, rows, k, max_anchors_per_span):
        results[name] = results.get(name, CategoryResult.nothing(k)) + found
    result = OfflineResult(k, dict(sorted(results.items())))
    _require_drafts(result.total)
    return result


@torch.no_grad()
def evaluate_rows(
    bound: BoundDrafter,
    rows: Iterable[Mapping[str, Any]],
    k: int,
    max_anchors_per_span: int | None = None,
) -> Iterator[tuple[str, CategoryResult]]:
    """Measure acceptance behind known answers, row by row; as `evaluate_texts`.

    Two drafters on the same rows are compared in pairs (`vllm_mtp.evaluation.paired`).

    Yields:
        The row's category, and what was counted in this row.
    """
    require_positions(bound.drafter.config, k)
    for row in rows:
        yield row["category"], _evaluate_row(bound, row, k, max_anchors_per_span)


def require_positions(config: DrafterConfig, k: int) -> None:
    """Raise unless the drafter can draft k tokens.

    Raises:
        MTPError: It cannot.
    """
    if not 1 <= k <= config.num_speculative_tokens:
        raise MTPError(
            f"num_speculative_tokens: got {k}, expected 1 to "
            f"{config.num_speculative_tokens}, what this drafter was made for"
        )


def _require_drafts(total: CategoryResult) -> None:
    if not total.sequences:
        raise DataError("no sequences to evaluate: got 0 rows, expected at least 1")
    if not total.teacher_forced.drafts:
        raise DataError(
            f"nothing to draft: none of the {total.sequences} sequences has an answer "
            f"of 2 tokens or more in loss_spans ({total.tokens} tokens in all). Use "
            "data with longer answers"
        )


def _evaluate_row(
    bound: BoundDrafter, row: Mapping[str, Any], k: int, most: int | None
) -> CategoryResult:
    tokens = sum(end - start for start, end in _spans_of(row))
    result = replace(CategoryResult.nothing(k), sequences=1, tokens=tokens)
    for by_k in accepted_lengths(bound, row, k, most):
        simulated = tuple(walk(lengths, n) for n, lengths in by_k.items())
        result += CategoryResult(0, 0, _counts(by_k[k], k), simulated)
    return result


@torch.no_grad()
def accepted_lengths(
    bound: BoundDrafter,
    row: Mapping[str, Any],
    k: int,
    max_anchors_per_span: int | None = None,
) -> list[dict[int, list[int]]]:
    """Draft behind every token of a row's answers.

    Args:
        bound: A drafter on an `HFTarget`.
        row: As in `evaluate_texts`.
        k: Tokens to draft.
        max_anchors_per_span: As in `evaluate_texts`.

    Returns:
        For each answer with an anchor, by 1 .. k drafted tokens: for every anchor in
        order, the number of leading drafts that are the target's own tokens. More than
        are drafted count as all of them (see `walk`).

    Raises:
        DataError: A span leaves the row's tokens.
    """
    host = _torch_host(bound)
    token_ids = torch.tensor(row["input_ids"], device=host.device)
    spans = [span for span in _spans_of(row) if anchors_of(span, max_anchors_per_span)]
    if not spans:
        return []
    config = bound.drafter.config
    states = host.encode(token_ids, streams=streams_of(config))
    found = []
    for span in spans:
        anchors = anchors_of(span, max_anchors_per_span)
        lens = torch.arange(anchors.start, anchors.stop, device=token_ids.device)
        blocks = TextBlocks(token_ids, states, lens)
        truth = _true_tokens(host, blocks, span[1], k)
        by_k = dict.fromkeys(range(1, k + 1), _leading(bound, blocks, truth))
        if config.block_mask == "bidirectional":
            # Rows of a shorter block see fewer others, and draft other tokens.
            shorter = range(1, k)
            by_k |= {n: _leading(bound, blocks, truth[:, :n]) for n in shorter}
        found.append(by_k)
    return found


def _leading(bound: BoundDrafter, blocks: TextBlocks, truth: torch.Tensor) -> list[int]:
    """How many leading drafts of each block are ``truth`` ``[B, n]``."""
    drafts = draft_everywhere(bound, blocks, truth.shape[1])
    return leading(drafts, truth).sum(dim=1).tolist()


def _spans_of(row: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The row's spans, checked."""
    spans = [(int(start), int(end)) for start, end in row["loss_spans"]]
    length = len(row["input_ids"])
    for start, end in spans:
        if not 0 <= start <= end <= length:
            raise DataError(
                f"row {row.get('prompt_id', '?')!r}: loss_spans has "
                f"[{start}, {end}), expected a part of its {length} input_ids; "
                "generate the data again"
            )
    return spans


@torch.no_grad()
def draft_everywhere(
    bound: BoundDrafter, blocks: TextBlocks, k: int, blocks_per_forward: int = _BLOCKS
) -> torch.Tensor:
    """Draft greedily behind many prefixes of one text.

    Args:
        bound: A drafter on an `HFTarget`.
        blocks: The text and its B prefix lengths.
        k: Tokens to draft.
        blocks_per_forward: Bounds the memory.

    Returns:
        Token ids ``[B, k]`` int64.
    """
    drafts = []
    for lens in blocks.prefix_lens.split(blocks_per_forward):
        some = [blocks._replace(prefix_lens=lens)]
        drafts.append(draft_texts(bound, some, k, pick_greedy)[0])
    return torch.cat(drafts)


def _true_tokens(host: HFTarget, blocks: TextBlocks, end: int, k: int) -> torch.Tensor:
    """What the target says at every position. ``[B, k]`` int64."""
    known = blocks.token_ids[:end]
    missing = int(blocks.prefix_lens[-1]) + k + 1 - end
    if missing > 0:
        rest = greedy_continuation(host, blocks.states, end, missing)
        known = torch.cat([known, rest])
    return block_labels(known, blocks.prefix_lens, k)


@torch.no_grad()
def greedy_continuation(
    host: HFTarget, states: TargetStates, length: int, count: int
) -> torch.Tensor:
    """Let the target go on behind a text that it has read.

    Args:
        host: The target.
        states: Of the text, or of a longer one.
        length: Tokens of the text.
        count: Tokens to say, at least 1.

    Returns:
        ``[count]`` int64.
    """
    cache = host.empty_cache()
    for layer, keys in states.keys.items():
        values = states.values[layer]
        cache.update(keys[None, :, :length], values[None, :, :length], layer)
    said = [host.logits(states.hidden[length - 1, None]).argmax(-1)]
    while len(said) < count:
        out = host.decoder(said[-1][None], past_key_values=cache, use_cache=True)
        said.append(host.logits(out.last_hidden_state[0]).argmax(-1))
    return torch.cat(said)


def walk(lengths: Sequence[int], k: int) -> AcceptanceCounts:
    """Decode an answer step by step.

    Args:
        lengths: For every anchor in order the number of leading drafts that are the
            target's own tokens; more than k count as k.
        k: Tokens drafted per step.
    """
    steps: list[int] = []
    position = 0
    while position < len(lengths):
        steps.append(min(lengths[position], k))
        position += steps[-1] + 1
    return _counts(steps, k)


def _counts(accepted: Sequence[int], k: int) -> AcceptanceCounts:
    """Counts of drafts of k tokens, given how many each had accepted."""
    per_position = tuple(sum(n > position for n in accepted) for position in range(k))
    return AcceptanceCounts(len(accepted), len(accepted) * k, per_position)


def _torch_host(bound: BoundDrafter) -> HFTarget:
    assert isinstance(bound.target, HFTarget), "known text is run in plain torch"
    return bound.target
