# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: one server with the method, as a user starts it.

The server is started when a test first asks for it, kept for the whole session, and
always gone at the end, with every process that it started.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from vllm_mtp.bench import servers
from vllm_mtp.bench.servers import Server, kill_server

START_SECONDS = 300
SERVER_ARGUMENTS = (
    "--speculative-config",
    # A fixed number: in bfloat16 a tie falls by how many rows are computed at once, and
    # how many drafts are worth their time hangs on what else the machine does.
    '{"method":"mtp_placeholder","num_speculative_tokens":4}',
    "--enforce-eager",
    "--max-model-len",
    "1024",
)


def user_environment() -> dict[str, str]:
    """The environment without what the tests set for engines in their own process."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("VLLM_") or name.startswith("VLLM_MTP_")
    }
    return kept | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # with /collective_rpc
    }


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """An engine's settings as flags of ``vllm serve``."""
    return [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]


def start_server(
    target: Path, folder: Path, arguments: Sequence[str] = SERVER_ARGUMENTS
) -> Server:
    """Start a server and wait until it answers; its log goes to ``folder``."""
    return servers.start_server(
        target, folder, arguments, user_environment(), START_SECONDS
    )


@pytest.fixture(scope="session")
def _servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    started: list[Server] = []
    try:
        yield started
    finally:
        for server in started:
            kill_server(server)


@pytest.fixture
def server(_servers: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """The session's server. One that a test has ended is started again."""
    from vllm_mtp.data.demo_target import ensure_demo_target

    if not _servers or not _servers[-1].running:
        folder = tmp_path_factory.mktemp("server")
        _servers.append(start_server(ensure_demo_target(), folder))
    return _servers[-1]
