# SPDX-License-Identifier: Apache-2.0
"""How answers were sampled, beside how ``vllm serve`` samples by default."""

from pathlib import Path
from typing import Any

from vllm_mtp.data.settings import SamplingSettings

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_NAMES = ("temperature", "top_p", "top_k", "min_p", *PENALTIES)


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
    served = sampling_defaults(target)
    neutral = SamplingSettings().model_dump()
    used = sampling.model_dump()
    differing = [
        f"{name} {used[name]} (served: {served.get(name, neutral[name])})"
        for name in _NAMES
        if name in served or name in PENALTIES
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
    """What the target's ``generation_config.json`` sets, as vLLM takes it."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(target).to_diff_dict()
    except (OSError, ValueError):  # none, or not readable
        return {}
    taken = {name: found[name] for name in _NAMES if found.get(name) is not None}
    return taken | ({"top_k": 0} if taken.get("top_k") == -1 else {})
