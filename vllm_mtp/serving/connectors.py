# SPDX-License-Identifier: Apache-2.0
"""KV connectors: which of vLLM's go with drafts, and how a draft leaves them alone.

A connector stores or sends blocks of the target's cache. It learns of them from two
sides: the scheduler tells it of computed tokens, and each attention layer calls it
before and behind its forward. The first never counts scratch slots, which lie behind
all computed tokens. The second would happen once more in a draft, which runs the
target's own attention layers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from vllm.distributed.kv_transfer import kv_transfer_state

from vllm_mtp.errors import UnsupportedTargetError
from vllm_mtp.plugin import METHOD

# Read and run, or held to a contract (tests/serving/test_connectors.py).
_KNOWN = (
    "ExampleConnector",
    "NixlConnector",
    "NixlPullConnector",
    "NixlPushConnector",
    "OffloadingConnector",
)
_OF_OTHERS = "MultiConnector"  # asks each of a list


def require_known_connector(transfer_config: Any) -> None:
    """Refuse a KV connector that has not been looked at.

    Args:
        transfer_config: vLLM's ``KVTransferConfig``, or a mapping with its keys; None
            without one.

    Raises:
        UnsupportedTargetError: With its name, and those that go.
    """
    for name in _names(transfer_config):
        if name not in _KNOWN:
            raise UnsupportedTargetError(
                f"kv_transfer_config.kv_connector: got {name!r}, which method "
                f"{METHOD!r} has not been tried with; expected one of "
                f"{', '.join(_KNOWN)}, or a {_OF_OTHERS} of these. Take one of them, "
                "leave out what makes it (kv_transfer_config, kv_offloading_size), or "
                "serve without this method."
            )


def _names(transfer_config: Any) -> Iterator[str]:
    """The connector's, and those of the connectors that it asks."""

    def of(key: str) -> Any:
        if isinstance(transfer_config, Mapping):
            return transfer_config.get(key)
        return getattr(transfer_config, key, None)

    name = of("kv_connector")
    if path := of("kv_connector_module_path"):
        yield f"{path}.{name}"  # whatever its name, it is not vLLM's
    elif name == _OF_OTHERS:
        for part in (of("kv_connector_extra_config") or {}).get("connectors") or ():
            yield from _names(part)
    elif name is not None:
        yield name


def no_connector(vllm_config: Any) -> Callable[[], AbstractContextManager[None]]:
    """What lets attention layers call no connector, if there is one at all.

    Args:
        vllm_config: The target's.
    """
    return _agent_away if any(_names(vllm_config.kv_transfer_config)) else nullcontext


@contextmanager
def _agent_away() -> Iterator[None]:
    """As vLLM's V2 runner does for its dummy runs.

    Nobody else looks for the agent meanwhile: transfers run on threads that have it.
    """
    agent = kv_transfer_state._KV_CONNECTOR_AGENT
    kv_transfer_state._KV_CONNECTOR_AGENT = None
    try:
        yield
    finally:
        kv_transfer_state._KV_CONNECTOR_AGENT = agent
