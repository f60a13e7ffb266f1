# SPDX-License-Identifier: Apache-2.0
"""Probe blocks: which ones are probed, and what a drafter computes for each.

Dimensions: N texts, B blocks behind all of them, k positions, P of these sketched.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from vllm_mtp.drafter.bound import BoundDrafter, Traced
from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.heads import pick_greedy
from vllm_mtp.drafter.layout import first_to_skip, possible_anchors
from vllm_mtp.errors import MTPError
from vllm_mtp.evaluation.sketch import sketch
from vllm_mtp.torch_host.hf_target import HFTarget
from vllm_mtp.torch_host.target_states import TargetStates
from vllm_mtp.torch_host.texts import TextBlocks, draft_texts, streams_of

MAX_TEXT_TOKENS = 512
_MAX_TEXTS = 4
_MAX_BLOCKS = 24
_MAX_SKETCHED_POSITIONS = 8
# Of a probe's sketches; the whole file stays below 300 kB.
_MAX_SKETCH_BYTES = 240_000
_BYTES_PER_SKETCH = 17 * 4


class Block(NamedTuple):
    """One block: a prefix of n tokens, and the anchor behind it."""

    prefix: tuple[int, ...]
    anchor: int

    @property
    def key(self) -> tuple[int, int]:
        """What tells the blocks of a probe apart."""
        return len(self.prefix), self.anchor


@dataclass(frozen=True)
class ProbeTexts:
    """Texts, and the blocks behind each. No two blocks have the same `Block.key`."""

    token_ids: tuple[tuple[int, ...], ...]
    prefix_lens: tuple[tuple[int, ...], ...]  # ascending

    def blocks(self) -> list[Block]:
        """All blocks, text by text."""
        return [
            Block(ids[:n], ids[n])
            for ids, lens in zip(self.token_ids, self.prefix_lens, strict=True)
            for n in lens
        ]


@dataclass(frozen=True)
class Outcome:
    """What a drafter computed for the blocks of a probe."""

    stages: dict[str, torch.Tensor]  # in order; [B, P, 17] float32 sketches
    drafts: torch.Tensor  # [B, k] int64


def stage_names(config: DrafterConfig) -> dict[int, str]:
    """Every sketched stage, in the order of computing, by its number in a trace."""
    layers = {index: f"layer {index}" for index in range(len(config.layers))}
    return {Traced.INPUT: "input", **layers, Traced.FINAL_NORM: "final norm"}


def sketched_positions(num_draft_tokens: int) -> list[int]:
    """Which positions of a block are sketched: at most eight, evenly spread."""
    count = min(num_draft_tokens, _MAX_SKETCHED_POSITIONS)
    return [i * (num_draft_tokens - 1) // max(count - 1, 1) for i in range(count)]


def choose_texts(
    rows: Iterable[Mapping[str, Any]], config: DrafterConfig, max_tokens: int
) -> ProbeTexts:
    """Choose a few texts and blocks, spread over each text.

    For a drafter with a window, one more block stands behind a text of which the window
    leaves something out: the others, over and over.

    Args:
        rows: See `probe.write_probe`.
        config: The drafter's.
        max_tokens: Longest text that the target takes; also cut to 512.

    Raises:
        MTPError: No row is long enough.
    """
    num_draft_tokens = config.num_speculative_tokens
    longest = min(max_tokens - num_draft_tokens, MAX_TEXT_TOKENS)
    num_texts, per_text = _counts(len(config.layers) + 2, num_draft_tokens)
    texts, lens, taken = [], [], set[tuple[int, int]]()
    for row in rows:
        ids = [int(token) for token in row["input_ids"]][:longest]
        free = [n for n in _anchors(row, len(ids)) if (n, ids[n]) not in taken]
        if free:
            lens.append(tuple(_spread(free, per_text)))
            texts.append(tuple(ids[: lens[-1][-1] + 1]))
            taken |= {(n, ids[n]) for n in lens[-1]}
        if len(texts) == num_texts:
            break
    if not texts:
        raise MTPError(
            f"probe: no row has 3 tokens or more within the first {longest}; give "
            "some ordinary texts"
        )
    if config.prefix_window is not None:
        num_prefix = first_to_skip(config.prefix_window) + 1
        if num_prefix + num_draft_tokens <= max_tokens:
            tokens = itertools.cycle([token for text in texts for token in text])
            texts.append(tuple(itertools.islice(tokens, num_prefix + 1)))
            lens.append((num_prefix,))
    return ProbeTexts(tuple(texts), tuple(lens))


def tries_window(texts: ProbeTexts, config: DrafterConfig) -> bool:
    """Whether a drafter with a window leaves something out behind one of the texts."""
    window = config.prefix_window
    return window is not None and any(
        n >= first_to_skip(window) for lens in texts.prefix_lens for n in lens
    )


def _counts(num_stages: int, num_draft_tokens: int) -> tuple[int, int]:
    """How many texts, and how many blocks behind each."""
    size = num_stages * len(sketched_positions(num_draft_tokens)) * _BYTES_PER_SKETCH
    num_blocks = min(_MAX_BLOCKS, max(_MAX_SKETCH_BYTES // size, 1))
    num_texts = min(_MAX_TEXTS, num_blocks)
    return num_texts, num_blocks // num_texts


def _anchors(row: Mapping[str, Any], num_tokens: int) -> list[int]:
    """Places for anchors, where the drafter learnt; else anywhere."""
    learnt = possible_anchors(row.get("loss_spans", []), num_tokens)
    if not len(learnt):
        learnt = possible_anchors([(0, num_tokens)], num_tokens)
    return learnt.tolist()


def _spread(positions: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of them, evenly spread, the last one included."""
    count = min(count, len(positions))
    return [positions[(i + 1) * len(positions) // count - 1] for i in range(count)]


class BlockRecorder:
    """A `BoundDrafter.trace` that keeps what it sees, block by block.

    A batch may hold the blocks in any order, and others too: a block is known by
    its position and anchor. Of a block that runs twice the first run is kept.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._keys: list[tuple[int, int]] = []
        self._seen: dict[tuple[int, int], dict[int, torch.Tensor]] = {}

    def __call__(self, stage: int, rows: torch.Tensor) -> None:
        if stage == Traced.POSITIONS:
            self._starts, self._keys = rows[:, 0].tolist(), []
        elif stage == Traced.ANCHORS:
            self._keys = list(zip(self._starts, rows.tolist(), strict=True))
        elif self._keys:
            self._keep(stage, rows)

    def _keep(self, stage: int, rows: torch.Tensor) -> None:
        if stage == Traced.DRAFTS:
            blocks = rows.cpu().long()
        else:
            blocks = sketch(rows).unflatten(0, (len(self._keys), -1))
            blocks = blocks[:, sketched_positions(blocks.shape[1])]
        for key, block in zip(self._keys, blocks, strict=True):
            self._seen.setdefault(key, {}).setdefault(stage, block.clone())

    def outcome(self, blocks: Sequence[Block], config: DrafterConfig) -> Outcome:
        """What was seen of these blocks.

        Raises:
            MTPError: Some block was never drafted.
        """
        missing = [
            b.key for b in blocks if Traced.DRAFTS not in self._seen.get(b.key, {})
        ]
        if missing:
            raise MTPError(
                f"check: {len(missing)} of {len(blocks)} blocks were not drafted, the "
                f"first behind {missing[0][0]} tokens with anchor {missing[0][1]}. The "
                "drafter does not run where it should; please report this"
            )
        seen = [self._seen[block.key] for block in blocks]

        def stacked(stage: int) -> torch.Tensor:
            return torch.stack([block[stage] for block in seen])

        stages = {name: stacked(stage) for stage, name in stage_names(config).items()}
        return Outcome(stages, stacked(Traced.DRAFTS))


@contextmanager
def recording(bound: BoundDrafter) -> Iterator[BlockRecorder]:
    """Record what the drafter computes; its former trace is back afterwards."""
    before, bound.trace = bound.trace, (recorder := BlockRecorder())
    try:
        yield recorder
    finally:
        bound.trace = before


@dataclass(frozen=True)
class TorchRun:
    """What the drafter and its target compute in plain torch."""

    outcome: Outcome
    states: dict[str, torch.Tensor]  # of the target, in order; [N, 17] sketches
    # [B, k]: best logit less the second best, in standard deviations of the logits
    gaps: torch.Tensor


@torch.no_grad()
def run_in_torch(bound: BoundDrafter, texts: ProbeTexts) -> TorchRun:
    """Draft all blocks in plain torch.

    Args:
        bound: On an `HFTarget`; weights and types as they are.
        texts: The blocks.
    """
    host, config = bound.target, bound.drafter.config
    assert isinstance(host, HFTarget), "known text is run in plain torch"
    streams = streams_of(config)
    pairs = zip(texts.token_ids, texts.prefix_lens, strict=True)
    behind = [_encode(host, *text, streams) for text in pairs]
    pick = _GapPick()
    with recording(bound) as recorder:
        draft_texts(
            bound, behind, config.num_speculative_tokens, pick, whole_blocks=True
        )
    return TorchRun(
        recorder.outcome(texts.blocks(), config),
        _sketch_states(behind, config.read_layers),
        torch.stack(pick.gaps, dim=1),
    )


def _encode(
    host: HFTarget,
    token_ids: tuple[int, ...],
    prefix_lens: tuple[int, ...],
    streams: tuple[int, ...],
) -> TextBlocks:
    ids = torch.tensor(token_ids, device=host.device)
    states = host.encode(ids, streams=streams)
    return TextBlocks(ids, states, torch.tensor(prefix_lens).to(ids))


def _sketch_states(
    texts: Sequence[TextBlocks], layers: Iterable[int]
) -> dict[str, torch.Tensor]:
    """The target's states at each text's last prefix token."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, rows: Iterable[torch.Tensor]) -> None:
        found[name] = sketch(torch.stack(list(rows)))

    def last(tensors: TargetStates, kind: str, layer: int, text: TextBlocks) -> Any:
        return getattr(tensors, kind)[layer][:, text.prefix_lens[-1] - 1].flatten()

    for layer in layers:
        for kind in ("values", "keys"):
            rows = (last(text.states, kind, layer, text) for text in texts)
            keep(f"{kind} of target layer {layer}", rows)
    ends = (text.states.hidden[text.prefix_lens[-1] - 1] for text in texts)
    keep("target's last hidden state", ends)
    return found


@dataclass
class _GapPick:
    """`heads.pick_greedy` that also notes how clear each choice was."""

    gaps: list[torch.Tensor] = field(default_factory=list)  # k times [B]

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        wide = logits.detach().float()
        best = wide.topk(min(2, wide.shape[-1])).values
        gap = (best[:, 0] - best[:, -1]) / wide.std(dim=-1, correction=0)
        self.gaps.append(gap.nan_to_num(nan=0.0).cpu())
        return pick_greedy(logits)
