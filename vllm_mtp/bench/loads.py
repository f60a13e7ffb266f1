# SPDX-License-Identifier: Apache-2.0
"""What the servers are asked: more at once, longer prompts, prompts of one kind."""

from collections.abc import Iterable, Sequence
from typing import Any

from vllm_mtp.bench.plan import Load, require_enough

CONCURRENCY, CONTEXT, CATEGORY = "concurrency", "context", "category"
PROMPTS_PER_CONTEXT = 2
_QUESTION = "\n\nThat was the text. Now answer this: "


def num_prompts(batch: int, least: int) -> int:
    """Prompts of a load: twice as many as are at once, so that requests also come
    while others are answered."""
    return max(least, 2 * batch)


def concurrency_loads(
    prompts: Sequence[str],
    batches: Iterable[int],
    least: int,
    output_tokens: int,
    source: str,
) -> list[Load]:
    """So many requests at once, of `num_prompts` prompts.

    Raises:
        MTPError: There are too few prompts; names ``source``.
    """
    wanted = {batch: num_prompts(batch, least) for batch in batches}
    require_enough(prompts, max(wanted.values()), source)
    return [
        Load(f"{batch} at once", tuple(prompts[:num]), batch, output_tokens)
        for batch, num in wanted.items()
    ]


def context_loads(
    tokenizer: Any,
    prompts: Sequence[str],
    sizes: Iterable[int],
    output_tokens: int,
    num_questions: int = PROMPTS_PER_CONTEXT,
) -> list[Load]:
    """One request at a time behind much text: other prompts, then a question.

    Args:
        tokenizer: The target's (transformers).
        prompts: The first are the questions, the others the text, over and over.
        sizes: Tokens of a prompt, about (the chat template comes on top).
        output_tokens: Longest answer.
        num_questions: Prompts of a load.
    """
    questions, others = prompts[:num_questions], prompts[num_questions:]
    text: list[int] = tokenizer("\n\n".join(others), add_special_tokens=False).input_ids
    loads = []
    for size in sizes:
        texts = []
        for number, question in enumerate(questions):
            asked = tokenizer(_QUESTION + question, add_special_tokens=False).input_ids
            room = max(size - len(asked), 0)
            # Not all behind the same text: their drafts would be alike.
            start = number * len(text) // len(questions)
            turned = text[start:] + text[:start]
            filled = (turned * (room // len(text) + 1))[:room]
            texts.append(tokenizer.decode(filled) + _QUESTION + question)
        loads.append(
            Load(f"{size} tokens before", tuple(texts), 1, output_tokens, CONTEXT)
        )
    return loads


def category_loads(
    by_category: dict[str, list[str]], most: int, output_tokens: int
) -> list[Load]:
    """One request at a time, of one kind of prompts.

    Args:
        by_category: Prompts.
        most: Of each kind.
        output_tokens: Longest answer.
    """
    return [
        Load(name, tuple(prompts[:most]), 1, output_tokens, CATEGORY)
        for name, prompts in by_category.items()
    ]
