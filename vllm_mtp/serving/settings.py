# SPDX-License-Identifier: Apache-2.0
"""The user's ``speculative_config`` for our method, checked key by key.

vLLM checks types too, but in a message without our keys' meaning, and the batch-size
schedule only in the scheduler, when the target is loaded already.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
)

from vllm_mtp.errors import MethodConfigError
from vllm_mtp.plugin import METHOD


def _name(value: Any) -> Any:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    # Not pydantic's own check, which refuses text that is no Unicode.
    if isinstance(text, str) and text.strip() and "\0" not in text:
        return value
    raise ValueError("not a name")


def _in_order(schedule: Any) -> Any:
    """Ranges of batch sizes from 1 on, without overlap."""
    end = 0
    for first, last, tokens in sorted(map(tuple, schedule)):
        if not (end < first <= last and tokens >= 0 and (end or first == 1)):
            raise ValueError("not in order")
        end = last
    return schedule


_Name = Annotated[Any, PlainValidator(_name)]
_Range = tuple[int, int, int] | Annotated[list[int], Field(min_length=3, max_length=3)]
_Schedule = Annotated[list[_Range] | tuple[_Range, ...], Field(min_length=1)]


class SpeculativeSettings(BaseModel):
    """What the user may give; a field's description is what is expected there.

    All are settings of vLLM's ``SpeculativeConfig`` that mean something for this
    method. Any other would be taken in silence and do nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    method: Any = None
    model: _Name = Field(None, description="the drafter's folder or hub id")
    revision: _Name = Field(None, description="a branch, tag or commit")
    num_speculative_tokens: int = Field(0, description="an integer")
    num_speculative_tokens_per_batch_size: Annotated[
        _Schedule, AfterValidator(_in_order)
    ] = Field(
        [],
        description="a list of [first, last, tokens], batch sizes from 1 on without "
        "overlap and tokens from 0 on",
    )
    draft_sample_method: Literal["greedy", "probabilistic"] = Field(
        "greedy", description="'greedy' or 'probabilistic'"
    )
    rejection_sample_method: Literal["standard", "block"] = Field(
        "standard", description="'standard' or 'block'"
    )
    enable_adaptive_verification: bool = Field(False, description="true or false")
    enforce_eager: bool = Field(False, description="true or false")


ALLOWED_KEYS = tuple(SpeculativeSettings.model_fields)

_SCHEDULE = "num_speculative_tokens_per_batch_size"
_USUAL = {"rejection_sample_method": "standard", "enable_adaptive_verification": False}


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
    try:
        SpeculativeSettings.model_validate(settings)
    except ValidationError as error:
        key = str(error.errors(include_input=False)[0]["loc"][0])
        raise MethodConfigError(
            f"speculative_config.{key}: got {shown(settings[key])}, expected "
            f"{SpeculativeSettings.model_fields[key].description}, or leave it out"
        ) from None
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


def require_v2(speculative_config: Any) -> None:
    """Refuse what the V1 runner takes in silence, and does not do.

    Args:
        speculative_config: Has the settings as attributes.

    Raises:
        MethodConfigError: Names the setting, and the runner that does it.
    """
    for key, usual in _USUAL.items():
        got = getattr(speculative_config, key, usual)
        if got != usual:
            raise MethodConfigError(
                f"speculative_config.{key}: got {shown(got)}, expected {usual!r}: only "
                "the V2 runner does it, and vLLM takes V1 here (V2 needs Triton, and "
                "VLLM_USE_V2_MODEL_RUNNER not to be 0). Leave it out."
            )


def shown(value: Any, most: int = 80) -> str:
    """A value for a message; whatever a user gave is short in it."""
    try:
        text = repr(value)
    except Exception:  # such as an integer of more digits than Python prints
        text = f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= most else f"{text[:most]}..."
