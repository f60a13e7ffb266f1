# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with the method, over HTTP, as a user runs it."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.servers import user_environment
from vllm_mtp.bench.servers import (
    STOP_SECONDS,
    Server,
    group_is_gone,
    serve_command,
)
from vllm_mtp.installed import installed_folder

pytestmark = pytest.mark.engine

QUESTION = "Explain in a few sentences why the sky is blue."
MAX_TOKENS = 48
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": MAX_TOKENS,
}


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def chat(client: OpenAI, model: str) -> str:
    answer = client.chat.completions.create(model=model, **CHAT)
    return answer.choices[0].message.content or ""


def chat_streamed(client: OpenAI, model: str) -> str:
    events = client.chat.completions.create(model=model, stream=True, **CHAT)
    return "".join(event.choices[0].delta.content or "" for event in events)


def completion(client: OpenAI, model: str) -> str:
    answer = client.completions.create(
        model=model,
        prompt=prompt_ids(model),
        temperature=0,
        max_tokens=MAX_TOKENS,
    )
    return answer.choices[0].text


def completion_streamed(client: OpenAI, model: str) -> str:
    events = client.completions.create(
        model=model,
        prompt=prompt_ids(model),
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
    )
    return "".join(event.choices[0].text for event in events)


def prompt_ids(model: str) -> list[int]:
    """What the chat endpoint makes of the question."""
    from transformers import AutoTokenizer

    ids: Any = AutoTokenizer.from_pretrained(model).apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_dict=False,
    )
    return ids


WAYS: dict[str, Callable[[OpenAI, str], str]] = {
    "chat": chat,
    "chat, streamed": chat_streamed,
    "completion": completion,
    "completion, streamed": completion_streamed,
}


def test_every_way_to_ask_gives_the_same_text(server: Server, client: OpenAI) -> None:
    texts = {name: ask(client, str(server.target)) for name, ask in WAYS.items()}
    assert len(texts["chat"]) > 50
    assert texts == dict.fromkeys(WAYS, texts["chat"])


def test_metrics_show_the_drafts(server: Server, client: OpenAI) -> None:
    before = server.acceptance()
    chat(client, str(server.target))
    counts = server.acceptance() - before
    assert counts.drafts > 5
    assert counts.draft_tokens > 3 * counts.drafts  # k is 4, less near the end
    # The drafter that the method finds, on a single answer: above what luck gives.
    assert counts.acceptance_per_position[0] > 0.1
    assert counts.acceptance_length > 1.1
    assert len(counts.accepted_per_position) == 4


def test_the_drafter_is_replaced_over_http(server: Server, client: OpenAI) -> None:
    def replace(drafter: str) -> dict[str, str | None]:
        call = {"method": "replace_drafter", "args": [drafter]}
        answer = httpx.post(f"{server.url}/collective_rpc", json=call, timeout=60)
        (result,) = answer.json()["results"]
        return result

    text = chat(client, str(server.target))
    folder = str(installed_folder("cheap"))  # the one that the target finds
    assert replace(folder) == {"drafter": folder, "error": None}
    refused = replace("/nonexistent")
    assert refused["drafter"] == folder
    assert "no such folder: '/nonexistent'" in str(refused["error"])
    assert chat(client, str(server.target)) == text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            '{"method":"mtp_placeholder","model":"/nonexistent"}',
            "speculative_config.model: no such folder: '/nonexistent'",
        ),
        (
            '{"method":"mtp_placeholder","draft_tensor_parallel_size":1}',
            (
                "method 'mtp_placeholder' does not take 'draft_tensor_parallel_size'; "
                "it takes method, model, "
            ),
        ),
    ],
    ids=["no such drafter", "unknown key"],
)
def test_wrong_use_is_refused_before_an_engine_starts(
    setting: str, message: str, smollm2: Path
) -> None:
    done = subprocess.run(
        [
            *serve_command(smollm2),
            "--enforce-eager",
            "--speculative-config",
            setting,
        ],
        capture_output=True,
        text=True,
        env=user_environment(),
        timeout=120,
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert "EngineCore" not in done.stdout + done.stderr


# The last one, since it ends the server that the others share.
def test_sigint_ends_a_server_that_is_at_work(server: Server, client: OpenAI) -> None:
    answer = client.completions.create(
        model=str(server.target),
        prompt=prompt_ids(str(server.target)),
        max_tokens=900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(answer))
    start = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    # vLLM ends its engine at once, but often waits for open streams to be closed,
    # also without this method.
    answer.close()
    server.process.wait(STOP_SECONDS)
    while not group_is_gone(server):
        assert time.monotonic() - start < STOP_SECONDS, "processes are left"
        time.sleep(0.1)
