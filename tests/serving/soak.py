# SPDX-License-Identifier: Apache-2.0
"""Random work for a server: requests of every kind, some of them given up midway."""

import asyncio
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from openai import AsyncOpenAI
from transformers import AutoTokenizer

from tests.tiny_targets import VOCAB_SIZE

MAX_MODEL_LEN = 256
CONCURRENCY = 16
MEAN_GAP_SECONDS = 0.05  # between arrivals, as long as `CONCURRENCY` allows
REGEX = "[a-z]{3,12}x"
PENALTY = {"repetition_penalty": 1.3}

Settings = tuple[tuple[str, float], ...]  # of a greedy request, beside temperature 0


@dataclass(frozen=True)
class GreedyAnswer:
    """To compare with the target alone."""

    prompt: tuple[int, ...]
    adapter: str | None
    settings: Settings
    token_ids: tuple[int, ...]
    whole: bool  # False: given up or stopped midway, so a beginning of the answer


@dataclass
class Figures:
    """What happened."""

    requests: Counter[str] = field(default_factory=Counter)  # answered, by kind
    given_up: Counter[str] = field(default_factory=Counter)  # by the way it was done
    at_limit: int = 0  # answers that filled the context
    greedy: list[GreedyAnswer] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # MiB, once a second


class Soak:
    """Keeps one server busy.

    Args:
        url: The server's, without /v1.
        model: Its model's folder.
        pid: Its first process.
        adapters: Names of the server's LoRA adapters.
        seed: Of everything that is chosen, but not of when it happens.
    """

    def __init__(
        self,
        url: str,
        model: str,
        pid: int,
        adapters: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self._rng = random.Random(seed)
        self._model = model
        self._adapters = (None, *adapters)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._process = psutil.Process(pid)
        self._client = AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key="unused",
            max_retries=0,
            timeout=120,
            http_client=httpx.AsyncClient(limits=httpx.Limits(max_connections=None)),
        )
        # Asked again and again: found in the prefix cache, or thrown out of it.
        self._pool = [self._prompt() for _ in range(48)]
        self.figures = Figures()

    async def run(self, seconds: float) -> Figures:
        """Send requests for so long, and wait for the last answers."""
        end = time.monotonic() + seconds
        positions = asyncio.Semaphore(CONCURRENCY)
        watch = asyncio.create_task(self._watch_memory())
        async with asyncio.TaskGroup() as group:
            # How many run at a time later on depends on the machine.
            for _ in range(CONCURRENCY):
                group.create_task(self._guarded(self._greedy_to_limit))
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < end:
                await positions.acquire()
                task = group.create_task(self._one())
                task.add_done_callback(lambda _: positions.release())
                await asyncio.sleep(self._rng.expovariate(1 / MEAN_GAP_SECONDS))
        watch.cancel()
        # vLLM renews its gauges with a step, and the last requests may be given up.
        await self._greedy()
        await self._client.close()
        return self.figures

    async def _watch_memory(self) -> None:
        while True:
            processes = [self._process, *self._process.children(recursive=True)]
            resident = sum(process.memory_info().rss for process in processes)
            self.figures.memory.append(resident / 2**20)
            await asyncio.sleep(1)

    async def _one(self) -> None:
        kinds: dict[Callable[[], Coroutine[Any, Any, None]], int] = {
            self._greedy: 5,
            self._greedy_streamed: 3,
            self._greedy_stopped: 2,
            self._sampled: 5,
            self._several: 2,
            self._structured: 2,
            self._disconnected: 3,
        }
        (kind,) = self._rng.choices(list(kinds), list(kinds.values()))
        await self._guarded(kind)

    async def _guarded(self, kind: Callable[[], Coroutine[Any, Any, None]]) -> None:
        name = kind.__name__.strip("_")
        try:
            await kind()
            self.figures.requests[name] += 1
        except Exception as error:  # told at the end, with all others
            self.figures.errors.append(f"{name}: {error!r}")

    def _prompt(self) -> list[int]:
        length = self._rng.choice([1, 5, 31, 32, 33, 64, 100, 150, 200, 240])
        return [self._rng.randrange(VOCAB_SIZE - 1) for _ in range(length)]

    def _max_tokens(self, prompt: list[int]) -> int:
        room = MAX_MODEL_LEN - len(prompt)
        if self._rng.random() < 0.15:
            return room
        return min(room, self._rng.randint(1, 80))

    def _ask(
        self,
        prompt: list[int],
        max_tokens: int,
        adapter: str | None = None,
        **settings: Any,
    ) -> Any:
        extra = {"ignore_eos": True, "return_token_ids": True}
        extra |= settings.pop("extra_body", {})
        return self._client.completions.create(
            model=adapter or self._model,
            prompt=prompt,
            max_tokens=max_tokens,
            extra_body=extra,
            **settings,
        )

    async def _greedy(self) -> None:
        prompt = self._rng.choice(self._pool)
        settings = self._rng.choice([{}, {}, PENALTY])
        max_tokens = self._max_tokens(prompt)
        logprobs = self._rng.choice([None, 5])
        adapter = self._rng.choice(self._adapters)
        answer = await self._ask(
            prompt,
            max_tokens,
            adapter,
            temperature=0,
            logprobs=logprobs,
            extra_body=settings,
        )
        (choice,) = answer.choices
        assert len(choice.token_ids) == max_tokens, choice.finish_reason
        if logprobs:
            _require_logprobs(choice)
        self._keep(
            prompt, choice.token_ids, whole=True, settings=settings, adapter=adapter
        )

    async def _greedy_to_limit(self) -> None:
        """As many of these as there are positions do not fit into the cache by far."""
        prompt = self._rng.choice([p for p in self._pool if len(p) <= 33])
        room = MAX_MODEL_LEN - len(prompt)
        answer = await self._ask(prompt, room, temperature=0)
        (choice,) = answer.choices
        self._keep(prompt, choice.token_ids, whole=True)

    async def _greedy_streamed(self) -> None:
        """Every other one is left before it ends."""
        prompt = self._rng.choice(self._pool)
        max_tokens = self._max_tokens(prompt)
        leave_after = self._rng.choice([None, self._rng.randint(1, 20)])
        adapter = self._rng.choice(self._adapters)
        events = await self._ask(
            prompt, max_tokens, adapter, temperature=0, stream=True
        )
        token_ids: list[int] = []
        async for event in events:
            token_ids += event.choices[0].token_ids or []
            if leave_after is not None and len(token_ids) >= leave_after:
                break
        await events.close()
        whole = len(token_ids) == max_tokens
        assert whole or leave_after is not None
        if not whole:
            self.figures.given_up["stream closed"] += 1
        self._keep(prompt, token_ids, whole=whole, adapter=adapter)

    async def _greedy_stopped(self) -> None:
        prompt = self._rng.choice(self._pool)
        stop = [self._rng.choice("abcdefgh"), "!"]
        answer = await self._ask(
            prompt, self._max_tokens(prompt), temperature=0, stop=stop
        )
        (choice,) = answer.choices
        assert choice.finish_reason in ("length", "stop")
        self._keep(prompt, choice.token_ids, whole=False)

    async def _sampled(self) -> None:
        prompt = self._prompt()
        max_tokens = self._max_tokens(prompt)
        extra = self._rng.choice([{}, {"top_k": 20}, PENALTY])
        answer = await self._ask(
            prompt,
            max_tokens,
            self._rng.choice(self._adapters),
            temperature=self._rng.choice([0.3, 0.7, 1.0, 1.5]),
            top_p=self._rng.choice([1.0, 0.9]),
            presence_penalty=self._rng.choice([0.0, 0.5]),
            frequency_penalty=self._rng.choice([0.0, 0.5]),
            logprobs=3,
            extra_body=extra,
        )
        (choice,) = answer.choices
        assert len(choice.token_ids) == max_tokens, choice.finish_reason
        _require_logprobs(choice)
        self._count_limit(prompt, choice.token_ids)

    async def _several(self) -> None:
        prompt, count = self._rng.choice(self._pool), self._rng.randint(2, 3)
        max_tokens = self._max_tokens(prompt)
        answer = await self._ask(prompt, max_tokens, temperature=0.8, n=count)
        lengths = [len(choice.token_ids) for choice in answer.choices]
        assert lengths == [max_tokens] * count

    async def _structured(self) -> None:
        prompt = self._rng.choice([p for p in self._pool if len(p) <= 200])
        answer = await self._ask(
            prompt,
            40,
            self._rng.choice(self._adapters),
            temperature=self._rng.choice([0.0, 1.0]),
            extra_body={"structured_outputs": {"regex": REGEX}, "ignore_eos": False},
        )
        (choice,) = answer.choices
        assert choice.finish_reason == "stop", choice.finish_reason
        # Not `text`: vLLM puts a prompt's last bytes there when they are half a letter.
        text = self._tokenizer.decode(choice.token_ids, skip_special_tokens=True)
        assert re.fullmatch(REGEX, text), text

    async def _disconnected(self) -> None:
        prompt = self._prompt()
        work = self._ask(prompt, self._max_tokens(prompt), temperature=1.0)
        try:
            await asyncio.wait_for(work, self._rng.uniform(0.01, 0.5))
        except TimeoutError:
            self.figures.given_up["disconnected"] += 1

    def _keep(
        self,
        prompt: list[int],
        token_ids: list[int],
        *,
        whole: bool,
        settings: dict[str, float] | None = None,
        adapter: str | None = None,
    ) -> None:
        self._count_limit(prompt, token_ids)
        self.figures.greedy.append(
            GreedyAnswer(
                tuple(prompt),
                adapter,
                tuple((settings or {}).items()),
                tuple(token_ids),
                whole,
            )
        )

    def _count_limit(self, prompt: list[int], token_ids: list[int]) -> None:
        self.figures.at_limit += len(prompt) + len(token_ids) == MAX_MODEL_LEN


def _require_logprobs(choice: Any) -> None:
    values = choice.logprobs.token_logprobs
    assert len(values) == len(choice.token_ids)
    assert all(math.isfinite(value) and value <= 0 for value in values)
