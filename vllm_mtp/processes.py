# SPDX-License-Identifier: Apache-2.0
"""Several processes of one command, as `torchrun` and `accelerate launch` start them.

Each would tell the user the same. What is said in every case, the first process says;
of an error, which may be one process's alone, the first that has it.
"""

import os
from datetime import timedelta


def count() -> int:
    """How many processes run the command."""
    return int(os.environ.get("WORLD_SIZE") or 1) if "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this one speaks for all."""
    return count() == 1 or os.environ["RANK"] == "0"


def is_first_to_fail() -> bool:
    """Whether no other process of the run has called this before.

    True as well where nobody can be asked: rather two messages than none.
    """
    if count() == 1:
        return True
    rank = os.environ["RANK"]
    try:
        # The store by which processes find each other; it outlives any one of them.
        from torch.distributed import TCPStore

        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=5),
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        found = store.compare_set(f"vllm_mtp/failed/{attempt}", "", rank)
    except Exception:  # of the environment, the network, torch's build ...
        return True
    return bool(found.decode() == rank)


def lost_another(error: BaseException) -> bool:
    """Whether an exchange with the others has failed, as where one has ended."""
    said = str(error).lower()
    words = ("gloo", "nccl", "connection closed by peer", "process group")
    return (
        count() > 1
        and isinstance(error, RuntimeError)
        and any(word in said for word in words)
    )
