# SPDX-License-Identifier: Apache-2.0
"""Tasks that people give to a served model, made of ShareGPT's text.

The text is real: code blocks and paragraphs of GPT's answers, and questions of users.
What is asked of it is drawn from `task_templates`, by the text's own hash, so the same
text always gives the same task. A task lies on its conversation's side of the split.
"""

import hashlib
import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vllm_mtp.data import task_templates as words
from vllm_mtp.data.sharegpt import (
    can_be_written,
    gpt_turns,
    human_turns,
    iter_sharegpt_conversations,
)

KINDS = ("code", "maths", "rewriting", "translation", "roleplay", "passage")
_SEED = 20
# The others of a kind are passed over, so that tasks next to each other are of the same
# part of the file.
_MOST_WAITING = 32

# Of each kind, the text's length in characters.
_CODE, _PARAGRAPH = (80, 1200), (200, 900)
_QUESTION, _MATHS = (20, 300), (20, 600)

_FENCE = re.compile(r"```([\w+#-]+)[ \t]*\n(.*?)\n?```", re.DOTALL)
_MARKUP = re.compile(r"[<>|*#{}\[\]=`_\\]|https?:")
# What a text is about that stands elsewhere, or who is talking.
_ELSEWHERE = re.compile(
    r"\b(above|below|previous|earlier|following|continue|again|you mentioned|"
    r"as an ai|language model|i apologi[sz]e|sorry|i hope|please note|note that|"
    r"(?:this|the) (?:code|function|script|example|query|command|method|class))\b",
    re.IGNORECASE,
)
_CONTEXT = re.compile(
    r"\b(that|this|these|those|it|its|they|them|he|she|his|her|your)\b", re.IGNORECASE
)
# Kinds of prompts that stay unseen, see `task_templates`.
_UNSEEN = re.compile(
    r"\b(\w*sql\w*|quer(?:y|ies)|databases?|recipes?|ingredients?|cook\w*|bak(?:e|ing)|"
    r"dish(?:es)?|eat|meals?|fables?|legends?|stor(?:y|ies)|tales?|bedtime|extract\w*|expla\w+)\b",
    re.IGNORECASE,
)
# Of what a question asks: how something is or works is an explanation.
_EXPLAINED = re.compile(
    r"\b(what (?:is|are|does|do|was|were)|what's|how (?:is|are|do|does|did)|why|"
    r"differences?|tell me|describe|define|meaning)\b",
    re.IGNORECASE,
)
_SQL = re.compile(
    r"\bselect\b.+?\bfrom\b|\binsert\s+into\b|\b(?:create|alter|drop)\s+table\b|"
    r"\bupdate\s+\S+\s+set\b|\bdelete\s+from\b|\b(?:inner|left|right)\s+join\b|sql",
    re.IGNORECASE | re.DOTALL,
)
_ASKS_FOR_MATHS = re.compile(
    r"\b(calculate|solve|equation|probability|percent|percentage|how many|how much|"
    r"derivative|integral|average|square root|multiply|divided by)\b",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+(?: (?:of |the )?[A-Z][a-z]+)*(?![A-Za-z])")


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        kind: One of `KINDS`.
        text: What the user says.
        first: The first prompt of the conversation whose text it has; None: it has
            nobody's.
    """

    kind: str
    text: str
    first: str | None = None


def every_task() -> Iterator[Task]:
    """Yield tasks, the kinds of `KINDS` by turns, until one of them has no more.

    Always the same, in the order of ShareGPT's file. Each text is used once.

    Raises:
        DemoPackageError: A package is missing; the message says how to get it.
    """
    found = _Waiting()
    drawn = _drawn_maths()
    for conversation in iter_sharegpt_conversations():
        found.take(conversation)
        while found.is_ready():
            yield from found.one_of_each(drawn)


class _Waiting:
    """Tasks by kind, not given out yet."""

    def __init__(self) -> None:
        self._tasks: dict[str, deque[Task]] = {kind: deque() for kind in KINDS}
        self._used: set[bytes] = set()

    def is_ready(self) -> bool:
        """Whether there is one of each kind; of maths there always is."""
        return all(self._tasks[kind] for kind in KINDS if kind != "maths")

    def one_of_each(self, drawn: Iterator[str]) -> Iterator[Task]:
        for kind in KINDS:
            waiting = self._tasks[kind]
            yield waiting.popleft() if waiting else Task("maths", next(drawn))

    def take(self, conversation: dict[str, Any]) -> None:
        """Make tasks of one conversation: at most one of each kind."""
        asked, answers = human_turns(conversation), gpt_turns(conversation)
        if not asked:
            return
        for kind, texts_of in _TEXTS_OF.items():
            if len(self._tasks[kind]) == _MOST_WAITING:
                continue
            for text in texts_of(asked, answers):
                if self._is_new(text):
                    task = Task(kind, _task_of(kind, text), asked[0])
                    self._tasks[kind].append(task)
                    break

    def _is_new(self, text: str) -> bool:
        """Whether a text was not used; from now on it is."""
        key = hashlib.sha256(text.encode()).digest()
        if key in self._used:
            return False
        self._used.add(key)
        return True


def _task_of(kind: str, text: str) -> str:
    """Draw what is asked of a text."""
    if kind == "maths":
        return text  # asks for it already
    drawn = random.Random(f"{_SEED} {kind} {text}")
    return drawn.choice(_TEMPLATES[kind]).format(
        text=text,
        language=drawn.choice(words.LANGUAGES),
        persona=drawn.choice(words.PERSONAS),
        topic=_topic_of(text),
    )


_TEMPLATES: dict[str, Sequence[str]] = {
    "code": words.CODE,
    "rewriting": words.REWRITING,
    "translation": words.TRANSLATION,
    "roleplay": words.ROLEPLAY,
    "passage": words.PASSAGE,
}


def _drawn_maths() -> Iterator[str]:
    """Problems with drawn numbers, each once, as long as somebody asks."""
    drawn, seen = random.Random(_SEED), set()
    while True:
        template, numbers = drawn.choice(words.MATHS)
        text = template.format(
            **{name: drawn.randint(*ends) for name, ends in numbers.items()}
        )
        if text not in seen:
            seen.add(text)
            yield text


def _code(_: Sequence[str], answers: Sequence[str]) -> Iterator[str]:
    for answer in answers:
        for language, code in _FENCE.findall(answer):
            if (
                language.lower() in words.CODE_LANGUAGES
                and _fits(code, _CODE)
                and can_be_written(code)
                and not _SQL.search(code)
            ):
                yield f"```{language}\n{code}\n```"


def _maths(asked: Sequence[str], _: Sequence[str]) -> Iterator[str]:
    # First turns are what `sharegpt` has already.
    return filter(_is_maths, asked[1:])


def _questions(asked: Sequence[str], _: Sequence[str]) -> Iterator[str]:
    return filter(_is_question, asked[:1])


def _single(_: Sequence[str], answers: Sequence[str]) -> Iterator[str]:
    return (text for answer in answers for text in _paragraphs(answer))


def _with_a_name(asked: Sequence[str], answers: Sequence[str]) -> Iterator[str]:
    return filter(_topic_of, _single(asked, answers))


# What a kind's tasks are made of, by what human and GPT say. The choosy ones first.
_TEXTS_OF: dict[str, Callable[[Sequence[str], Sequence[str]], Iterable[str]]] = {
    "code": _code,
    "maths": _maths,
    "roleplay": _questions,
    "passage": _with_a_name,
    "translation": _single,
    "rewriting": _single,
}


@lru_cache(256)  # asked for by several kinds in turn
def _paragraphs(answer: str) -> list[str]:
    """Prose that can stand alone, of one answer."""
    parts = (part.strip() for part in re.split(r"\n\s*\n", answer))
    return [part for part in parts if _is_prose(part)]


def _is_prose(text: str) -> bool:
    return (
        _fits(text, _PARAGRAPH)
        and text.isascii()
        and "\n" not in text
        and text[0].isupper()
        and text[-1] in ".!?"
        and len(re.findall(r"[.!?](?:\s|$)", text)) > 1
        and not any(found.search(text) for found in (_MARKUP, _ELSEWHERE, _UNSEEN))
    )


def _is_question(text: str) -> bool:
    return (
        _fits(text, _QUESTION)
        and can_be_written(text)
        and "\n" not in text
        and text.endswith("?")
        and not any(
            found.search(text)
            for found in (_MARKUP, _ELSEWHERE, _CONTEXT, _UNSEEN, _EXPLAINED)
        )
    )


def _is_maths(text: str) -> bool:
    return (
        _fits(text, _MATHS)
        and can_be_written(text)
        and re.search(r"\d", text) is not None
        and _ASKS_FOR_MATHS.search(text) is not None
        and not any(found.search(text) for found in (_ELSEWHERE, _CONTEXT, _UNSEEN))
    )


def _topic_of(text: str) -> str | None:
    """A name that the text has inside a sentence, the longest one."""
    return max(_NAME.findall(text), key=len, default=None)


def _fits(text: str, ends: tuple[int, int]) -> bool:
    return ends[0] <= len(text) <= ends[1]
