# SPDX-License-Identifier: Apache-2.0
"""Servers end with the benchmark, however it ends."""

import signal
import subprocess
import sys

_PROGRAM = """
import time
from vllm_mtp.bench.servers import sigterm_unwinds
with sigterm_unwinds():
    try:
        print("started", flush=True)
        time.sleep(60)
    finally:
        print("servers ended", flush=True)
"""


def test_sigterm_lets_servers_end() -> None:
    command = [sys.executable, "-c", _PROGRAM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.terminate()
        assert process.stdout.read() == "servers ended\n"
    assert process.returncode == 128 + signal.SIGTERM
