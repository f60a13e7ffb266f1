# SPDX-License-Identifier: Apache-2.0
"""What ``vllm-mtp generate`` writes is what vLLM's chat endpoint reads and says, token
by token, with a template that has a thinking mode.

Every run asks the endpoint's code in this process; a server of its own takes longer to
start: ``pytest -m slow tests/data/test_trained_as_served.py``.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.data.conftest import WriteJsonl, generate_command, make_tokenizer
from tests.servers import flags_of, start_server
from vllm_mtp import engine
from vllm_mtp.bench.servers import kill_server
from vllm_mtp.cli.main import main
from vllm_mtp.data.store import read_split

pytest.importorskip("vllm")
pytest.importorskip("datasets")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

# As in `serving.engines`; the command leaves alone what is set.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

MAX_TOKENS = 24
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 4}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    *([{"role": "user", "content": f"Hello {n}"}] for n in range(24)),
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "é ☃"}]},
    ],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "1", "reasoning": "a number"},
        {"role": "user", "content": "Two"},
    ],
]

Ask = Callable[[dict[str, Any]], dict[str, Any]]


class EngineOfThisProcess:
    """As much of a server's engine as its chat endpoint asks for."""

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self.vllm_config = self._engine.vllm_config
        self.model_config = self._engine.model_config
        self.renderer = self._engine.renderer
        self.input_processor = self._engine.input_processor
        self.errored = False

    def check_admission(self, _: int) -> None:
        pass

    async def generate(
        self, prompt: Any, params: Any, request_id: str, **_: Any
    ) -> AsyncIterator[Any]:
        self._engine.add_request(request_id, prompt, params)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                yield output


@contextmanager
def in_process(target: Path, _: Path) -> Iterator[Ask]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.renderers.online_renderer import OnlineRenderer

    with engine.start(target, **SETTINGS) as llm:
        client: Any = EngineOfThisProcess(llm)
        template: dict[str, Any] = {
            "request_logger": None,
            "chat_template": None,
            "chat_template_content_format": "auto",
        }
        endpoint = OpenAIServingChat(
            client,
            OpenAIServingModels(client, [BaseModelPath(str(target), str(target))]),
            "assistant",
            online_renderer=OnlineRenderer(
                client.model_config, client.renderer, **template
            ),
            **template,
        )

        def ask(body: dict[str, Any]) -> dict[str, Any]:
            request = ChatCompletionRequest(**body)
            answer: Any = asyncio.run(endpoint.create_chat_completion(request))
            found: dict[str, Any] = answer.model_dump()
            return found

        yield ask


@contextmanager
def by_a_server(target: Path, folder: Path) -> Iterator[Ask]:
    server = start_server(target, folder, [*flags_of(SETTINGS), "--enforce-eager"])

    def ask(body: dict[str, Any]) -> dict[str, Any]:
        url = f"{server.url}/v1/chat/completions"
        answer = httpx.post(url, json=body, timeout=120)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    try:
        yield ask
    finally:
        kill_server(server)


Text = tuple[list[int], list[int], str]


def said_by_the_endpoint(ask: Ask, target: Path, kwargs: dict[str, Any]) -> list[Text]:
    texts = []
    for messages in CONVERSATIONS:
        found = ask(
            {
                "model": str(target),
                "messages": messages,
                "chat_template_kwargs": kwargs,
                "max_completion_tokens": MAX_TOKENS,
                "temperature": 0,
                "return_token_ids": True,
            }
        )
        (choice,) = found["choices"]
        ids = found["prompt_token_ids"], choice["token_ids"]
        texts.append((*ids, choice["finish_reason"]))
    return sorted(texts)


def trained_on(
    target: Path, prompts: Path, out: Path, kwargs: dict[str, Any]
) -> list[Text]:
    command = generate_command(
        target=target,
        prompts=prompts,
        out=out,
        chat_template_kwargs=json.dumps(kwargs),
        temperature=0,
        dtype="float32",
        max_prompt_tokens=128,
        max_tokens=MAX_TOKENS,
        max_num_seqs=4,
        held_out=0,
    )
    assert main(command) == 0
    return sorted(
        (row["input_ids"][:start], row["input_ids"][start:], row["finish_reason"])
        for row in read_split(out)
        for ((start, _),) in [row["loss_spans"]]
    )


@pytest.mark.parametrize(
    "endpoint", [in_process, pytest.param(by_a_server, marks=pytest.mark.slow)]
)
def test_the_ids_are_those_of_the_chat_endpoint(
    endpoint: Callable[[Path, Path], AbstractContextManager[Ask]],
    thinking_target: Path,
    write_jsonl: WriteJsonl,
    tmp_path: Path,
) -> None:
    modes: list[dict[str, Any]] = [{"enable_thinking": on} for on in (False, True)]
    with endpoint(thinking_target, tmp_path) as ask:
        served = [said_by_the_endpoint(ask, thinking_target, mode) for mode in modes]
    prompts = write_jsonl([{"messages": turns} for turns in CONVERSATIONS])
    ends = ("|><think></think>", "<|assistant|>")
    for number, (texts, end) in enumerate(zip(served, ends, strict=True)):
        # An answer that is only its end is nothing to train on.
        kept = [text for text in texts if len(text[1]) > (text[2] == "stop")]
        out = tmp_path / f"{number}"
        assert trained_on(thinking_target, prompts, out, modes[number]) == kept
        assert len(kept) > 20
        assert sum(len(answer) for _, answer, _ in kept) > 60
        decode = make_tokenizer().decode
        assert all(decode(prompt).endswith(end) for prompt, *_ in kept)
