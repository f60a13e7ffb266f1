# SPDX-License-Identifier: Apache-2.0
"""What a user can do next with a drafter that a command has written."""

import json
import shlex
from pathlib import Path

from vllm_mtp.drafter.config import DrafterConfig
from vllm_mtp.drafter.served import unserved_text
from vllm_mtp.plugin import METHOD


def served_line(config: DrafterConfig, folder: Path | str, target: str) -> str:
    """How to serve a drafter, or that vLLM does not.

    Args:
        config: The drafter's.
        folder: Where it is.
        target: As the user named it.
    """
    if why := unserved_text(config):
        return (
            f"vLLM does not serve it yet ({why}); it can be trained, and measured with "
            "vllm-mtp eval"
        )
    spec = json.dumps({"method": METHOD, "model": str(folder)}, separators=(",", ":"))
    return (
        f"serve it:  vllm serve {shlex.quote(target)} --speculative-config "
        f"{shlex.quote(spec)}"
    )


def checked_line(config: DrafterConfig, folder: Path | str, target: str) -> str:
    """How to compare vLLM with torch, with its line break; empty where vLLM cannot
    run the drafter."""
    if config.unserved:
        return ""
    return (
        f"check it:  vllm-mtp check {shlex.quote(str(folder))} --target "
        f"{shlex.quote(target)}\n"
    )
