# SPDX-License-Identifier: Apache-2.0
"""A killed worker ends as vLLM ends it: with its own error, and without hanging."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.servers import user_environment

SCRIPT = """
import multiprocessing, os, signal, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    target, drafter = sys.argv[1:]
    llm = LLM(
        target,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        skip_tokenizer_init=True,
        speculative_config={"method": "mtp_placeholder", "model": drafter},
    )
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=200, detokenize=False)
    engine.add_request("one", {"prompt_token_ids": [1, 2, 3]}, params)
    while not engine.step():
        pass
    (core,) = multiprocessing.active_children()
    print("killing", core.name, flush=True)
    os.kill(core.pid, signal.SIGKILL)
    while engine.has_unfinished_requests():
        engine.step()
"""


@pytest.mark.engine
@pytest.mark.slow
def test_a_killed_engine_core_ends_the_parent(
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(SCRIPT, "utf-8")
    paths = (tiny_targets["llama"], tiny_drafter("llama", "shared-4"))
    log = tmp_path / "killed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(script), *map(str, paths)],
            env=user_environment(),
            # No pipe: vLLM's worker may outlive its parent for a while, and hold it.
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = process.wait(timeout=300)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    text = log.read_text("utf-8", "replace")
    assert "killing EngineCore" in text, text[-3000:]
    assert code == 1
    assert "vllm.v1.engine.exceptions.EngineDeadError" in text
