# SPDX-License-Identifier: Apache-2.0
"""An answer as a page of its own: one file, light and dark, nothing loaded."""

from collections.abc import Mapping
from html import escape

from vllm_mtp.evaluation.answer_text import around_marker, summary
from vllm_mtp.evaluation.attribution import Answer, Token

_COLOURS = 4
"""Of the positions from 1 on; later ones begin again."""

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #fff; --ink: #1c1e21; --soft: #62676e; --line: #dcdfe3;
  --p1: #c9efd5; --p2: #c6e2fb; --p3: #e7d5fa; --p4: #fce3b6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --card: #1c1f25; --ink: #e8eaed; --soft: #9aa1ab; --line: #343a44;
    --p1: #1f5537; --p2: #1d4a70; --p3: #533a72; --p4: #684a14;
  }
}
body {
  margin: 0 auto; max-width: 46rem; padding: 2rem 1.25rem 4rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, sans-serif;
}
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .5rem; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; color: var(--soft); font-weight: 600; }
.question, .answer {
  background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .9rem 1.1rem; white-space: pre-wrap; overflow-wrap: anywhere;
}
.answer { line-height: 2.1; }
.step { border-bottom: 2px solid var(--line); margin-right: 2px; padding-bottom: 2px; }
.draft { border-radius: .2rem; padding: .1rem 0; }
.p1 { background: var(--p1); } .p2 { background: var(--p2); }
.p3 { background: var(--p3); } .p4 { background: var(--p4); }
sup { font-size: .65em; line-height: 0; color: var(--soft); }
table { border-collapse: collapse; width: 100%; }
td { border-bottom: 1px solid var(--line); padding: .3rem .6rem .3rem 0;
  vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.note, footer { color: var(--soft); font-size: .9rem; }
code { font-family: ui-monospace, monospace; font-size: .9em; }
""".strip()


def answer_page(
    answer: Answer, rows: Mapping[str, str], command: str, versions: Mapping[str, str]
) -> str:
    """The page.

    Args:
        answer: Whose tokens to show.
        rows: The rest of the report, by name.
        command: What made it.
        versions: By package.
    """
    tokens = "".join(_step(step) for step in answer.steps)
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Where each token came from</title>
<style>
{_STYLE}
</style>
</head>
<body>
<h1>Where each token came from</h1>
<p class="note">{escape(summary(answer))}. Each underlined run is one step: the drafts
that it accepted, in colour and with their positions, then one token of the target's
own.</p>
<h2>Question</h2>
<div class="question">{escape(answer.question)}</div>
<h2>Answer</h2>
<div class="answer">{tokens}</div>
<h2>Tokens</h2>
<table>
{"".join(map(_legend_row, answer.by_position.items()))}</table>
<h2>The whole run</h2>
<table>
{"".join(map(_row, rows.items()))}</table>
<footer><p><code>{escape(command)}</code><br>{escape(packages)}</p></footer>
</body>
</html>
"""


def _step(step: tuple[Token, ...]) -> str:
    return f'<span class="step">{"".join(map(_token, step))}</span>'


def _token(token: Token) -> str:
    if not token.position:
        return escape(token.text)
    before, seen, behind = map(escape, around_marker(token))
    title = f"accepted draft, position {token.position}"
    return (
        f'{before}<span class="{_class(token.position)}" title="{title}">{seen}'
        f"<sup>{token.position}</sup></span>{behind}"
    )


def _class(position: int) -> str:
    return f"draft p{(position - 1) % _COLOURS + 1}"


def _legend_row(row: tuple[int, int]) -> str:
    position, count = row
    name = f"accepted drafts at position {position}" if position else "the target's own"
    name = _token(Token(name, position))
    return f'<tr><td>{name}</td><td class="number">{count}</td></tr>\n'


def _row(row: tuple[str, str]) -> str:
    name, text = map(escape, row)
    return f"<tr><td>{name}</td><td>{text}</td></tr>\n"
