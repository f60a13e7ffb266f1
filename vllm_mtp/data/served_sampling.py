# SPDX-License-Identifier: Apache-2.0
"""How answers were sampled, beside how ``vllm serve`` samples by default."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_mtp.data.settings import SamplingSettings
from vllm_mtp.errors import DataError

_FIELDS = tuple(SamplingSettings.model_fields)
# What a request sets of sampling, and a target has defaults for.
NAMES = tuple(name for name in _FIELDS if name != "seed")
PENALTIES = tuple(name for name in _FIELDS if name.endswith("_penalty"))
# What has a say only where a token is drawn.
_OF_DRAWING = ("top_p", "top_k", "min_p")


def in_use(temperature: float) -> tuple[str, ...]:
    """The names of the settings that change answers at a temperature; all but a few
    are ignored by greedy decoding."""
    ignored = _OF_DRAWING if temperature == 0 else ()
    return tuple(name for name in NAMES if name not in ignored)


def as_served(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A target's defaults with what they imply in ``vllm serve``.

    Args:
        defaults: As its ``generation_config.json`` has them; what transformers has as
            a default too, a temperature of 1 above all, is left out there.
    """
    found = {name: defaults[name] for name in NAMES if defaults.get(name) is not None}
    if found.get("top_k") == -1:
        found["top_k"] = 0  # both say: all
    if any(name in found for name in _OF_DRAWING):
        found.setdefault("temperature", 1.0)
    return found


def penalties_of(sampling: SamplingSettings) -> dict[str, float]:
    """The penalties in use, which change greedy decoding too."""
    neutral = SamplingSettings()
    return {
        name: getattr(sampling, name)
        for name in PENALTIES
        if getattr(sampling, name) != getattr(neutral, name)
    }


def difference_from_served(sampling: SamplingSettings, target: Path) -> str | None:
    """Say where ``vllm serve`` does otherwise for a request that sets nothing.

    Args:
        sampling: Of the answers.
        target: The target's folder.

    Returns:
        One sentence; None where nothing that the target sets differs.
    """
    served = as_served(sampling_defaults(target))
    neutral = SamplingSettings().model_dump()
    used = sampling.model_dump()
    temperatures = (sampling.temperature, served.get("temperature"))
    differing = [
        f"{name} {used[name]} (served: {served.get(name, neutral[name])})"
        for name in in_use(0 if 0 in temperatures else 1)
        if name != "max_tokens" and (name in served or name in PENALTIES)
        if used[name] != served.get(name, neutral[name])
    ]
    if not differing:
        return None
    return (
        f"the answers were sampled with {', '.join(differing)}: the target's "
        "generation_config.json says otherwise, and `vllm serve` follows it where a "
        "request does not say"
    )


def sampling_defaults(target: Path) -> dict[str, Any]:
    """What the target's ``generation_config.json`` sets, as vLLM takes it.

    Raises:
        DataError: The file holds something else.
    """
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(target).to_diff_dict()
    except OSError:  # none, or not readable, where vLLM goes on without too
        return {}
    except Exception as error:  # of any kind: transformers does not check
        raise DataError(
            f"{target}/generation_config.json: cannot be used ({error}); expected a "
            "JSON object of transformers' generation settings, or no such file"
        ) from None
    names = [name for name in NAMES if name != "max_tokens"]
    return {name: found[name] for name in names if found.get(name) is not None}
