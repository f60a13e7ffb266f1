# SPDX-License-Identifier: Apache-2.0
"""The user's ``speculative_config`` for our method, checked key by key.

vLLM checks types too, but in a message without our keys' meaning, and the batch-size
schedule only in the scheduler, when the target is loaded already.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from vllm_mtp.errors import MethodConfigError
from vllm_mtp.plugin import METHOD

# Settings of vLLM's SpeculativeConfig that mean something for this method, and one of
# our own. Any other would be taken in silence and do nothing, so it is refused.
ALLOWED_KEYS = (
    "method",
    "model",
    "revision",
    "num_speculative_tokens",
    "num_speculative_tokens_per_batch_size",
    "draft_sample_method",
    "enforce_eager",
    "min_draft_probability",
)
OWN_KEYS = ("min_draft_probability",)
"""Those of `ALLOWED_KEYS` that vLLM's ``SpeculativeConfig`` does not know."""

_SCHEDULE = "num_speculative_tokens_per_batch_size"


def checked(requested: dict[str, Any]) -> dict[str, Any]:
    """The settings that are given; None counts as left out.

    Raises:
        MethodConfigError: Names the key, what was got and what was expected.
    """
    unknown = [key for key in requested if key not in ALLOWED_KEYS]
    if unknown:
        raise MethodConfigError(
            f"speculative_config: method {METHOD!r} does not take "
            f"{', '.join(map(shown, unknown[:5]))}; it takes "
            f"{', '.join(ALLOWED_KEYS)}. Remove the others."
        )
    settings = {key: value for key, value in requested.items() if value is not None}
    for key, rule in _RULES.items():
        if key in settings and not rule.holds(settings[key]):
            raise MethodConfigError(
                f"speculative_config.{key}: got {shown(settings[key])}, expected "
                f"{rule.expected}, or leave it out"
            )
    return settings


def num_speculative_tokens(settings: dict[str, Any], made_for: int) -> int:
    """Tokens per step: those asked for, or all that the drafter was made for.

    Args:
        settings: What `checked` gave.
        made_for: The drafter's own number.

    Raises:
        MethodConfigError: More were asked for, here or in the batch-size schedule.
    """
    wanted: int = settings.get("num_speculative_tokens", made_for)
    if not 1 <= wanted <= made_for:
        raise MethodConfigError(
            f"speculative_config.num_speculative_tokens: got {shown(wanted)}, but the "
            f"drafter was made for 1 to {made_for}. Ask for at most {made_for}, "
            f"leave it out (then it is {made_for}), or make a drafter with more: "
            "vllm-mtp init --num-speculative-tokens ..."
        )
    most = max((tokens for _, _, tokens in settings.get(_SCHEDULE, ())), default=0)
    if most > wanted:
        raise MethodConfigError(
            f"speculative_config.{_SCHEDULE}: got {shown(most)} tokens, expected 0 to "
            f"{wanted} (num_speculative_tokens)"
        )
    return wanted


def shown(value: Any, most: int = 80) -> str:
    """A value for a message; whatever a user gave is short in it."""
    try:
        text = repr(value)
    except Exception:  # such as an integer of more digits than Python prints
        text = f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= most else f"{text[:most]}..."


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_probability(value: Any) -> bool:
    is_number = isinstance(value, float) or _is_integer(value)
    return is_number and 0 <= value <= 1


def _is_name(value: Any) -> bool:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    return isinstance(text, str) and bool(text.strip()) and "\0" not in text


def _is_schedule(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    if not all(_is_range(entry) for entry in value):
        return False
    ranges = sorted(tuple(entry) for entry in value)
    ends = [0, *(last for _, last, _ in ranges)]
    return ranges[0][0] == 1 and all(
        first > end for (first, _, _), end in zip(ranges, ends, strict=False)
    )


def _is_range(entry: Any) -> bool:
    if not isinstance(entry, (list, tuple)) or len(entry) != 3:
        return False
    if not all(map(_is_integer, entry)):
        return False
    first, last, tokens = entry
    return 1 <= first <= last and tokens >= 0


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    expected: str


def _one_of(values: Iterable[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in values


_RULES = {
    "model": _Rule(_is_name, "the drafter's folder or hub id"),
    "revision": _Rule(_is_name, "a branch, tag or commit"),
    "num_speculative_tokens": _Rule(_is_integer, "an integer"),
    _SCHEDULE: _Rule(
        _is_schedule,
        "a list of [first, last, tokens], batch sizes from 1 on without overlap and "
        "tokens from 0 on",
    ),
    "draft_sample_method": _Rule(
        _one_of(("greedy", "probabilistic")), "'greedy' or 'probabilistic'"
    ),
    "enforce_eager": _Rule(lambda value: isinstance(value, bool), "true or false"),
    "min_draft_probability": _Rule(_is_probability, "a number from 0 to 1"),
}
