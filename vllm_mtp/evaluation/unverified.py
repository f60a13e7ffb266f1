# SPDX-License-Identifier: Apache-2.0
"""Decoding in which drafts are taken, not verified, while the drafter is sure of them.

As multi-token prediction by self-distillation (arXiv 2602.06019) and Set Block Decoding
(2509.04185) decode. Every forward of the target gives one token that is the target's
own, and the drafter as many more as a `Rule` lets pass. They are part of the text from
then on: the target reads them and goes on behind them. So the text may be another than
the target's. It is an experiment in plain torch; vLLM always verifies.

Dimensions: B texts, k positions, E entries of the cache, V scored tokens.
"""

from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from vllm_mtp.drafter.bound import BoundDrafter
from vllm_mtp.drafter.heads import pick_greedy_with_scores
from vllm_mtp.drafter.target_facts import layers_with_attention, sliding_windows
from vllm_mtp.errors import MTPError
from vllm_mtp.torch_host.hf_target import HFTarget, outputs_of
from vllm_mtp.torch_host.target_states import TargetStates
from vllm_mtp.torch_host.texts import TextBlocks, anchors_are_exact, draft_texts


@dataclass(frozen=True)
class Rule:
    """Which drafts are taken: the first ones, up to one that does not pass.

    Attributes:
        kind: ``probability``: those of which the drafter's own probability is at least
            ``bound`` (the adaptive decoding of 2602.06019). ``entropy``: those up to
            which the entropies of the drafter's distributions sum up to ``bound`` nats
            at most (the bound of 2509.04185's sampler leaves the largest of them out of
            the sum, so that one is always taken; here the target gives that one).
        bound: 1.0 of a probability, and 0.0 of an entropy, take next to nothing.

    Raises:
        MTPError: The bound is none.
    """

    kind: Literal["probability", "entropy"]
    bound: float

    def __post_init__(self) -> None:
        most = 1.0 if self.kind == "probability" else float("inf")
        if not 0 <= self.bound <= most:
            raise MTPError(
                f"{self.kind}: got a bound of {self.bound}, expected 0 to {most:g}"
            )

    def num_taken(self, scores: torch.Tensor, sure: int = 0) -> torch.Tensor:
        """How many of the drafts of each text are taken.

        Args:
            scores: ``[B, k, V]``, what greedy drafts were chosen by.
            sure: So many of the first are the target's own and always taken.

        Returns:
            ``[B]`` int64.
        """
        log_q = scores.float().log_softmax(-1)
        if self.kind == "probability":
            passes = log_q[:, sure:].amax(-1).exp() >= self.bound
        else:
            # Minus infinity, of tokens that cannot be drafted, times 0 is no number.
            entropy = -(log_q.exp() * log_q.clamp(min=-1e4)).sum(-1)
            passes = entropy[:, sure:].cumsum(-1) <= self.bound
        return sure + passes.long().cumprod(-1).sum(-1)


class RunningTexts:
    """Texts that the target has read, and goes on reading, each at its own pace.

    All texts share one cache. A forward adds as many entries to each as the longest
    addition has; those that are too many are masked for good. Sliding windows and
    recurrent layers count entries, not tokens, so a target with these takes one text.

    Args:
        host: The target.
        streams: Layers whose output is kept too.
    """

    def __init__(self, host: HFTarget, streams: Collection[int] = ()) -> None:
        self.host = host
        self._streams = streams
        self._cache = host.empty_cache()
        self._is_token = torch.zeros(0, 0, dtype=torch.bool, device=host.device)
        self._hidden = torch.zeros(0)
        self._outputs: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def read(self, token_ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Read on.

        Args:
            token_ids: ``[B, m]`` int64.
            counts: ``[B]`` int64; so many of the first are tokens, at least one.

        Returns:
            Last hidden states ``[B, m, hidden_size]``, of use where tokens are.
        """
        width = token_ids.shape[1]
        at = torch.arange(width, device=token_ids.device)
        is_token = at < counts[:, None]
        if not len(self._is_token):
            self._is_token = is_token[:, :0]
        positions = self._is_token.sum(1)[:, None] + at
        self._is_token = torch.cat([self._is_token, is_token], dim=1)
        is_whole = bool(self._is_token.all())
        assert is_whole or takes_several(self.host), "one text at a time"
        with outputs_of(self.host.decoder.layers, self._streams) as outputs:
            out = self.host.decoder(
                token_ids,
                # A text that was always alone has none that are too many.
                attention_mask=None if is_whole else self._is_token.long(),
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            )
        hidden = out.last_hidden_state
        is_first = width == self._is_token.shape[1]
        self._hidden = hidden if is_first else torch.cat([self._hidden, hidden], dim=1)
        for layer, new in outputs.items():
            old = [] if is_first else [self._outputs[layer]]
            self._outputs[layer] = torch.cat([*old, new], dim=1)
        return hidden

    def states(self, index: int, cached: Collection[int]) -> TargetStates:
        """Of one text, with the keys and values of some layers."""
        layers: list[Any] = self._cache.layers
        where = self._is_token[index].nonzero()[:, 0]
        return TargetStates(
            {i: layers[i].keys[index][:, where] for i in cached},
            {i: layers[i].values[index][:, where] for i in cached},
            self._hidden[index, where],
            {i: out[index, where] for i, out in self._outputs.items()},
        )

    def keep(self, texts: torch.Tensor) -> None:
        """Go on with some of the texts only.

        Args:
            texts: ``[B']`` int64, which.
        """
        self._cache.batch_select_indices(texts)
        self._is_token, self._hidden = self._is_token[texts], self._hidden[texts]
        self._outputs = {i: out[texts] for i, out in self._outputs.items()}

    def copy(self) -> "RunningTexts":
        """The same texts, that can go on otherwise."""
        other = RunningTexts(self.host, self._streams)
        other._cache = deepcopy(self._cache)
        other._is_token, other._hidden = self._is_token, self._hidden
        other._outputs = dict(self._outputs)
        return other


def takes_several(host: HFTarget) -> bool:
    """Whether one `RunningTexts` can hold more than one text of a target."""
    config = host.decoder.config.get_text_config()
    if len(layers_with_attention(config)) < len(host.decoder.layers):
        return False
    return not any(sliding_windows(config))


class Prompts(NamedTuple):
    """Prompts that the target has read."""

    token_ids: list[list[int]]
    texts: RunningTexts
    first: torch.Tensor  # [B] int64, the target's first token of each answer


@dataclass
class Answer:
    """One answer.

    Attributes:
        token_ids: Up to its end.
        given_up: For each of them, how much likelier (in nats) the target found its own
            token there, behind the same text; 0 for what the target said.
        is_draft: For each of them, whether it was taken from a draft.
        agrees: For each of them, whether it is the target's likeliest there.
        steps: Tokens of each forward behind the prompt's, uncut at the end.
    """

    token_ids: list[int] = field(default_factory=list)
    given_up: list[float] = field(default_factory=list)
    is_draft: list[bool] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def add(self, token: int, given_up: float, is_draft: bool, agrees: bool) -> None:
        self.token_ids.append(token)
        self.given_up.append(given_up)
        self.is_draft.append(is_draft)
        self.agrees.append(agrees)

    def end(self, max_tokens: int, stop: Collection[int]) -> int | None:
        """Where it ends; None while it goes on."""
        for number, token in enumerate(self.token_ids[:max_tokens], 1):
            if token in stop:
                return number
        return max_tokens if len(self.token_ids) >= max_tokens else None

    def cut(self, end: int) -> None:
        for column in (self.token_ids, self.given_up, self.is_draft, self.agrees):
            del column[end:]


@torch.no_grad()
def read_prompts(
    host: HFTarget, prompts: Sequence[Sequence[int]], streams: Collection[int] = ()
) -> Prompts:
    """Let the target read prompts of any lengths, at least one token each.

    Args:
        host: The target.
        prompts: Token ids.
        streams: As in `RunningTexts`.
    """
    texts = RunningTexts(host, streams)
    counts = torch.tensor([len(prompt) for prompt in prompts], device=host.device)
    width = int(counts.max())
    rows = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
    hidden = texts.read(torch.tensor(rows, device=host.device), counts)
    last = hidden[torch.arange(len(rows), device=host.device), counts - 1]
    first = host.logits(last).argmax(-1)
    return Prompts([list(prompt) for prompt in prompts], texts, first)


@torch.no_grad()
def answer(
    prompts: Prompts,
    max_tokens: int,
    stop: Collection[int],
    bound: BoundDrafter | None = None,
    rule: Rule | None = None,
) -> list[Answer]:
    """Answer prompts greedily.

    Args:
        prompts: As read; they can be answered again.
        max_tokens: Most tokens of an answer.
        stop: Tokens that end an answer.
        bound: A drafter on the same target; None for the target's own answers.
        rule: Which of its drafts are taken.
    """
    texts = prompts.texts.copy()
    answers = [Answer() for _ in prompts.token_ids]
    for of_one, token in zip(answers, prompts.first.tolist(), strict=True):
        of_one.add(token, 0.0, is_draft=False, agrees=True)
    anchors = prompts.first[:, None]
    running = list(range(len(answers)))
    while True:
        going = [
            row
            for row, number in enumerate(running)
            if answers[number].end(max_tokens, stop) is None
        ]
        if len(going) < len(running):
            where = torch.tensor(going, dtype=torch.int64, device=anchors.device)
            running, anchors = [running[row] for row in going], anchors[where]
            if running:
                texts.keep(where)
        if not running:
            break
        rows, counts = anchors, torch.ones_like(anchors[:, 0])
        if bound is not None and rule is not None:
            known = [prompts.token_ids[i] + answers[i].token_ids for i in running]
            drafts, taken = _draft(texts, known, bound, rule)
            counts = taken + 1
            rows = torch.cat([anchors, drafts], dim=1)[:, : int(counts.max())]
        log_p = texts.host.logits(texts.read(rows, counts)).float().log_softmax(-1)
        best, said = log_p.max(-1)
        taken_log_p = log_p[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]
        given_up = (best[:, :-1] - taken_log_p).tolist()
        for row, number in enumerate(running):
            count = int(counts[row])
            for at in range(1, count):
                token = int(rows[row, at])
                agrees = token == int(said[row, at - 1])
                answers[number].add(token, given_up[row][at - 1], True, agrees)
            answers[number].add(int(said[row, count - 1]), 0.0, False, True)
            answers[number].steps.append(count)
        anchors = said.gather(1, counts[:, None] - 1)
    for of_one in answers:
        of_one.cut(of_one.end(max_tokens, stop) or max_tokens)
    return answers


def _draft(
    texts: RunningTexts, known: Sequence[Sequence[int]], bound: BoundDrafter, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drafts ``[B, k]`` behind the last known tokens, which the target has not read
    yet, and how many of them are taken ``[B]``."""
    config, device = bound.drafter.config, texts.host.device
    blocks = [
        TextBlocks(
            torch.tensor(tokens, device=device),
            texts.states(row, config.read_layers),
            torch.tensor([len(tokens) - 1], device=device),
        )
        for row, tokens in enumerate(known)
    ]
    drafts, scores = draft_texts(
        bound,
        blocks,
        config.num_speculative_tokens,
        pick_greedy_with_scores,
        whole_blocks=True,  # no state holds an anchor's row yet
    )
    assert scores is not None, "the pick gives them"
    # Of the whole target the anchor's row is the target's own, and so is what is
    # chosen there among all tokens by the target's LM head.
    all_said = config.draft_vocab_size is None and config.lm_head == "target"
    return drafts, rule.num_taken(scores, int(anchors_are_exact(config) and all_said))


@dataclass(frozen=True)
class Comparison:
    """Answers beside the target's own.

    Attributes:
        tokens_per_forward: Of the target, the prompt's left out; in verified decoding
            this is the acceptance length.
        drafts_taken: Tokens of the answers that were drafts.
        drafts_agreed: The part of these that the target would have said itself there,
            behind the same text.
        agreed: The part of all tokens of which that holds.
        given_up: Nats that the target found its own token likelier, mean over the
            drafts that were taken.
        same_start: How far answers are the target's own from the start on: equal tokens
            up to the first difference, over the tokens of the target's answers.
        same_positions: Equal tokens at the same positions, over those of the longer one
            of both answers.
        same_answers: The part of the answers that are the target's own.
    """

    tokens_per_forward: float
    drafts_taken: int
    drafts_agreed: float
    agreed: float
    given_up: float
    same_start: float
    same_positions: float
    same_answers: float


def compare(answers: Sequence[Answer], own: Sequence[Answer]) -> Comparison:
    """Compare answers with those that the target gives alone.

    Args:
        answers: Of `answer` with a rule.
        own: Of the same prompts, without.
    """
    steps = [step for one in answers for step in one.steps]
    flags = [
        (is_draft, agrees)
        for one in answers
        for is_draft, agrees in zip(one.is_draft, one.agrees, strict=True)
    ]
    drafts = [agrees for is_draft, agrees in flags if is_draft]
    given_up = sum(sum(one.given_up) for one in answers)
    start = positions = longest = 0
    for one, wanted in zip(answers, own, strict=True):
        same = [a == b for a, b in zip(one.token_ids, wanted.token_ids, strict=False)]
        start += (same + [False]).index(False)
        positions += sum(same)
        longest += max(len(one.token_ids), len(wanted.token_ids))
    equal = [
        one.token_ids == wanted.token_ids
        for one, wanted in zip(answers, own, strict=True)
    ]
    return Comparison(
        tokens_per_forward=sum(steps) / max(len(steps), 1),
        drafts_taken=len(drafts),
        drafts_agreed=sum(drafts) / len(drafts) if drafts else 1.0,
        agreed=sum(agrees for _, agrees in flags) / len(flags),
        given_up=given_up / len(drafts) if drafts else 0.0,
        same_start=start / sum(len(one.token_ids) for one in own),
        same_positions=positions / longest,
        same_answers=sum(equal) / len(equal),
    )
