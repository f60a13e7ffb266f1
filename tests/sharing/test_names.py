# SPDX-License-Identifier: Apache-2.0
"""Nothing that is published tells where somebody's files lie."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sharing.conftest import HOME
from vllm_mtp.sharing.names import (
    cached_revision,
    is_repo_id,
    public_text,
    public_value,
)

CACHED = f"{HOME}/.cache/huggingface/hub/models--own-er--na.me/snapshots/0a1b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/jane/data/a.jsonl", "a.jsonl"),
        ("/home/jane doe/run 1/", "run 1"),
        ("~/data/answers", "answers"),
        ("~jane/answers", "answers"),
        ("../jane/answers", "answers"),
        ("C:\\Users\\jane\\answers", "answers"),
        ("hf:/home/jane/set", "hf:set"),
        ("file:///home/jane/set", "set"),
        ("from /home/jane/a, and file:/home/jane/b.", "from a, and b."),
        ("path=/home/jane/x", "path=x"),
        ("/", "."),
        (CACHED, "own-er/na.me"),
    ],
)
def test_paths_become_names(text: str, expected: str) -> None:
    assert public_text(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "owner/name",
        "hf:owner/name",
        "shared:0-9,own:28,29",
        "https://huggingface.co/owner/name",
        "see https://huggingface.co/owner/name.",
        "4 / 5",
        "1.0",
        "a|b\nc",
        "",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert public_text(text) == text


NAMES = st.text("abz09_.-", min_size=1, max_size=8).filter(lambda n: n.strip("."))
STARTS = st.sampled_from(["", "hf:", "file://", "x ", "x=", "'", '"', "(", "a, "])
PATHS = st.builds(
    lambda start, names: f"{start}{HOME}/{'/'.join(names)}",
    STARTS,
    st.lists(NAMES, min_size=1, max_size=3),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | PATHS,
    lambda inner: st.lists(inner) | st.dictionaries(PATHS, inner),
    max_leaves=8,
)


@given(VALUES)
def test_no_home_folder_is_left_anywhere(value: object) -> None:
    clean = public_value(value)  # type: ignore[type-var]
    assert HOME not in json.dumps(clean)
    assert public_value(clean) == clean


def test_what_is_read_off_a_cached_repository() -> None:
    assert cached_revision(CACHED) == "0a1b"
    assert cached_revision("/home/jane/model") is None
    assert is_repo_id("owner/na-me.1")
    assert not is_repo_id("name")
    assert not is_repo_id("/home/jane")
    assert not is_repo_id("./name")
