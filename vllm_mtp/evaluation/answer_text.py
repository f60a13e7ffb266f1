# SPDX-License-Identifier: Apache-2.0
"""An answer in a terminal: accepted drafts in colour, each with its position."""

from rich.text import Text

from vllm_mtp.evaluation.attribution import Answer, Token

_STYLES = ("green", "cyan", "magenta", "yellow")
"""Of the positions from 1 on; later ones begin again."""

_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def answer_text(answer: Answer) -> Text:
    """The answer; without colour the positions still tell what is what."""
    text = Text()
    for step in answer.steps:
        for token in step:
            text.append(_marked(token), _style(token.position))
    return text


def legend_text(answer: Answer) -> Text:
    """How many tokens came from where."""
    text = Text()
    for position, count in answer.by_position.items():
        name = f"draft at position {position}" if position else "target's own"
        sample = _marked(Token("text", position))
        text.append(f"{sample:<6}", _style(position))
        text.append(f" {name}: {count} token{'s' * (count != 1)}\n")
    text.append(summary(answer))
    return text


def around_marker(token: Token) -> tuple[str, str, str]:
    """The space before a draft, what its position is written behind, and the rest."""
    if seen := token.text.strip():
        before, _, behind = token.text.partition(seen)
        return before, seen, behind
    # With nothing between them, the positions of two tokens read as one number.
    return "", "·", token.text


def summary(answer: Answer) -> str:
    """The one figure that an answer shows."""
    tokens, steps = sum(map(len, answer.steps)), len(answer.steps)
    return f"{tokens} tokens in {steps} steps of the target, which alone needs {tokens}"


def _style(position: int) -> str:
    return _STYLES[(position - 1) % len(_STYLES)] if position else ""


def _marked(token: Token) -> str:
    if not token.position:
        return token.text
    before, seen, behind = around_marker(token)
    number = str(token.position).translate(_SUPERSCRIPTS)
    return f"{before}{seen}{number}{behind}"
