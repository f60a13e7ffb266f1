# SPDX-License-Identifier: Apache-2.0
"""Which tokens were drafts, and how an answer is shown, without an engine."""

import io
import re
from collections.abc import Sequence
from html import unescape
from typing import Any

import pytest
from rich.console import Console

from vllm_mtp.evaluation.answer_page import answer_page
from vllm_mtp.evaluation.answer_text import answer_text, legend_text
from vllm_mtp.evaluation.attribution import Answer, StepRecord, Token, attribute
from vllm_mtp.metrics import AcceptanceCounts


def decode_bytes(token_ids: Sequence[int]) -> str:
    """A tokenizer of bytes, which cuts characters; 256 is a token without text."""
    return bytes(i for i in token_ids if i < 256).decode("utf-8", errors="replace")


def answered(
    text: str | list[int], sizes: list[int], *, accepted: int | None = None
) -> Answer:
    """An answer of byte tokens; by default no step was cut off."""
    token_ids = list(text.encode()) if isinstance(text, str) else text
    if accepted is None:
        accepted = sum(sizes) - len(sizes)
    counts = AcceptanceCounts(len(sizes) - 1, 4 * len(sizes), (accepted,))
    return attribute("?", StepRecord(token_ids, sizes, counts), decode_bytes)


def positions(answer: Answer) -> list[list[int]]:
    return [[token.position for token in step] for step in answer.steps]


def texts(answer: Answer) -> list[str]:
    return [token.text for step in answer.steps for token in step]


def test_the_last_token_of_a_step_is_the_targets() -> None:
    answer = answered("abcdefg", [1, 3, 1, 2])
    assert positions(answer) == [[0], [1, 2, 0], [0], [1, 0]]
    assert texts(answer) == list("abcdefg")
    assert answer.by_position == {0: 4, 1: 2, 2: 1}


@pytest.mark.parametrize(
    ("accepted", "last"),
    [(3, [1, 0]), (4, [1, 2]), (6, [1, 2])],
    ids=["whole", "the target's token cut off", "drafts cut off too"],
)
def test_an_answer_can_end_within_the_drafts(accepted: int, last: list[int]) -> None:
    answer = answered("abcdef", [1, 3, 2], accepted=accepted)
    assert positions(answer) == [[0], [1, 2, 0], last]


def test_an_answer_without_drafts_is_the_targets() -> None:
    answer = answered("abc", [1, 1, 1])
    assert answer.by_position == {0: 3}
    assert shown(answer) == "abc"


def test_an_answer_of_one_token_and_an_empty_one() -> None:
    assert positions(answered("a", [1])) == [[0]]
    assert answered("", []).steps == ()
    assert "<html" in page(answered("", []))


def test_a_character_goes_to_the_token_that_ends_it() -> None:
    answer = answered("né€!", [1, 4, 2])
    assert texts(answer) == ["n", "", "é", "", "", "€", "!"]
    # The first half of é is a draft too; the point keeps the two numbers apart.
    assert shown(answer) == "n·¹é²·³€¹!"


def test_a_character_that_the_answer_cuts_is_shown_as_such() -> None:
    answer = answered([ord("a"), 0xE2, 0x82], [1, 2])
    assert "".join(texts(answer)) == decode_bytes([ord("a"), 0xE2, 0x82])
    assert "�" in texts(answer)[-1]


def test_a_token_without_text_shows_nothing() -> None:
    answer = answered([ord("a"), ord("b"), 256], [1, 2])
    assert texts(answer) == ["a", "b", ""]
    assert shown(answer) == "ab¹"


def test_a_position_stands_before_the_space_behind_a_token() -> None:
    answer = Answer("?", ((Token(" sky ", 1), Token("\n", 2), Token("is", 0)),))
    assert shown(answer) == " sky¹ ·²\nis"


def shown(answer: Answer) -> str:
    """In a terminal without colour."""
    return answer_text(answer).plain


def page(answer: Answer, question: str = "?") -> str:
    answer = Answer(question, answer.steps)
    return answer_page(answer, {"a<b": "1 & 2"}, "vllm-mtp demo", {"vLLM": "0.32.0"})


@pytest.mark.parametrize("color_system", ["standard", None])
def test_without_colour_the_positions_are_left(color_system: Any) -> None:
    out = io.StringIO()
    answer = answered("abc", [1, 2])
    Console(file=out, color_system=color_system).print(answer_text(answer))
    assert ("\x1b[" in out.getvalue()) == (color_system is not None)
    assert re.sub(r"\x1b\[\d*m", "", out.getvalue()) == "ab¹c\n"


def test_the_legend_counts_every_token() -> None:
    answer = answered("abcdefg", [1, 3, 1, 2])
    text = legend_text(answer).plain
    assert sum(map(int, re.findall(r": (\d+) tokens?\n", text))) == 7
    assert "draft at position 2: 1 token\n" in text
    assert "7 tokens in 4 steps" in text


def test_a_page_says_of_each_token_where_it_came_from() -> None:
    source = page(answered("abcdefg", [1, 3, 1, 2]))
    body = source.partition('<div class="answer">')[2].partition("</div>")[0]
    assert body.count('<span class="step">') == 4
    assert re.findall(r"position (\d)\"", body) == ["1", "2", "1"]
    assert unescape(re.sub(r"<sup>.*?</sup>|<[^>]*>", "", body)) == "abcdefg"


def test_a_page_loads_nothing_and_escapes_everything() -> None:
    bad = "<script>alert('1')</script>&amp;"
    source = page(answered(bad, [1, *[2] * 15, 1]), question=bad)
    assert "<script" not in source
    assert "&lt;script&gt;" in source
    assert "a&lt;b" in source
    assert "1 &amp; 2" in source
    assert not re.search(r"https?:|src=|@import|url\(", source)
    assert "prefers-color-scheme: dark" in source
