# SPDX-License-Identifier: Apache-2.0
"""How many of our files a decoding step enters: what a reader has to follow."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import vllm_mtp
from tests.serving.engines import engine

pytestmark = pytest.mark.engine

PACKAGE = str(Path(vllm_mtp.__file__).parent)
MOST_FILES = 10


def files_entered(run: Callable[[], Any]) -> set[str]:
    """Our files of which ``run`` calls a function."""
    entered: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGE):
            entered.add(file.removeprefix(PACKAGE).lstrip("/"))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered


# All there is in a drafter, with and without what V1 does at once and what it puts off.
@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_a_step_enters_few_files(
    method: str,
    tiny_targets: dict[str, Path],
    tiny_drafter: Callable[[str, str], Path],
) -> None:
    from vllm import SamplingParams

    spec = {
        "method": "mtp_placeholder",
        "model": str(tiny_drafter("llama", "mixed-windowed")),
        "draft_sample_method": method,
    }
    with engine(tiny_targets["llama"], spec, max_model_len=512) as llm:
        sampling = SamplingParams(temperature=1.0, max_tokens=30, detokenize=False)
        prompt: Any = {"prompt_token_ids": list(range(400))}
        llm.llm_engine.add_request("0", prompt, sampling)
        for _ in range(3):  # the prompt, and what the first steps set up
            llm.llm_engine.step()
        entered = files_entered(llm.llm_engine.step)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
    print(sorted(entered))
    assert "drafter/layout.py" in entered, "the step drafts"
    assert {"drafter/layers.py", "drafter/lora.py", "drafter/heads.py"} <= entered
    assert len(entered) <= MOST_FILES, sorted(entered)
