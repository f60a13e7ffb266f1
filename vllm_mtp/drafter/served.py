# SPDX-License-Identifier: Apache-2.0
"""Drafters that are trained and evaluated, but that vLLM cannot run yet."""

from pathlib import Path

from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.errors import MethodConfigError
from vllm_mtp.plugin import METHOD


def unserved_text(config: DrafterConfig) -> str:
    """Why vLLM cannot run a drafter, such as ``extra_rows: 2``; empty where it can."""
    return ", ".join(f"{name}: {value}" for name, (value, _) in config.unserved.items())


def require_served(config: DrafterConfig, folder: Path | str) -> None:
    """Refuse what is trained and evaluated in plain torch only.

    Args:
        config: The drafter's.
        folder: Where it is, to be named.

    Raises:
        MethodConfigError: Names the first key by which vLLM cannot run it.
    """
    for name, (value, plain) in config.unserved.items():
        raise MethodConfigError(
            f"{folder}: {name}: got {value!r}, expected {plain!r}; the method "
            f"{METHOD!r} does not serve such drafters yet, they are only trained and "
            "evaluated (vllm-mtp eval, without --in-vllm). Use a drafter without it"
        )
