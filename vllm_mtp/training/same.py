# SPDX-License-Identifier: Apache-2.0
"""What the processes of a run must agree on, or they would wait for each other."""

from accelerate.utils import gather_object  # type: ignore[import-untyped]

from vllm_mtp.training.states import TrainingInputError


def require_same_everywhere(key: str, seen: str) -> None:
    """Refuse a run whose processes see different files.

    Args:
        key: The setting that names the folder.
        seen: What this process found there.

    Raises:
        TrainingInputError: Another one found something else; every process raises.
    """
    found: list[str] = gather_object([seen])
    if len(set(found)) > 1:
        raise TrainingInputError(
            f"{key}: process {found.index(seen)} of the run found {seen!r}, others "
            f"{sorted(set(found) - {seen})}; all machines of a run need the same "
            "folders, so put it on a file system that they share"
        )
