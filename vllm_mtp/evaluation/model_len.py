# SPDX-License-Identifier: Apache-2.0
"""How long an engine's texts may be, where that changes what the target computes."""

from pathlib import Path

from vllm_mtp.drafter.target_facts import long_rope_from


def model_len_as_served(target: Path | str, longest: int) -> int:
    """``max_model_len`` for texts of ``longest`` tokens.

    vLLM rotates by longrope's short factors where this is short. A server takes the
    config's own length, so its factors are the long ones, as in training.

    Args:
        target: The target's folder or hub id.
        longest: Tokens of the longest text.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(target).get_text_config()
    return max(longest, long_rope_from(config) or 0)
