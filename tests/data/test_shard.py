# SPDX-License-Identifier: Apache-2.0
"""Parts of a source's prompts: disjoint, equal, and together the whole."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.conftest import make_tokenizer
from tests.data.test_render import FakeChat
from vllm_mtp.data.odd_rows import OddRows
from vllm_mtp.data.prompts import Prompt
from vllm_mtp.data.render import Renderer, Request, prepare
from vllm_mtp.data.settings import PromptCounts, SourceSettings
from vllm_mtp.data.shard import Shard
from vllm_mtp.data.split import is_held_out

RENDERER = Renderer(FakeChat(make_tokenizer()), chat_template=False)
LONGEST = 4
# Few letters, so that there are duplicates; some too long, and one without a token.
texts = st.lists(st.text("ab", max_size=5), max_size=40)


def requests(
    of: Sequence[str], shard: Shard
) -> tuple[list[Request], PromptCounts, int]:
    prompts = [Prompt(({"role": "user", "content": text},), "c") for text in of]
    odd = OddRows()
    found, counts = prepare(prompts, RENDERER, LONGEST, odd, shard)
    return found, counts, sum(odd.counts.values())


@given(texts, st.integers(1, 9))
def test_shards_are_disjoint_and_their_union_is_the_whole(
    of: list[str], count: int
) -> None:
    whole, all_counts, odd = requests(of, Shard())
    shards = [requests(of, Shard(n + 1, count)) for n in range(count)]
    names = [request.prompt_id for found, *_ in shards for request in found]
    assert len(set(names)) == len(names)
    assert sorted(names) == sorted(request.prompt_id for request in whole)
    assert sum(number for *_, number in shards) == odd
    for number, (found, counts, _) in enumerate(shards):
        # Each in the source's order, and as many as in any other one.
        order = [request for request in whole if request in found]
        assert found == order
        assert counts.kept == len(found)
        assert counts.read == all_counts.read == len(of)
        assert counts.duplicates_dropped == all_counts.duplicates_dropped
        different = len(of) - counts.duplicates_dropped
        own = different - counts.in_other_shards
        assert own == len(range(number, different, count))


@given(texts, st.integers(1, 9), st.floats(0, 1))
def test_the_side_of_the_split_is_the_same_in_every_shard(
    of: list[str], count: int, held_out: float
) -> None:
    def held(found: list[Request]) -> set[str]:
        ids = [request.prompt_id for request in found]
        return {name for name in ids if is_held_out(name, held_out)}

    shards = [requests(of, Shard(n + 1, count))[0] for n in range(count)]
    assert set().union(*map(held, shards)) == held(requests(of, Shard())[0])


@pytest.mark.parametrize(
    "text", ["0/8", "9/8", "3", "3/", "/8", "-1/8", "3/8/2", "¹/8"]
)
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(ValueError, match="expected such as 3/8"):
        SourceSettings(prompts="p", shard=text)


def test_the_words() -> None:
    assert Shard.parse(None) == Shard.parse("1/1") == Shard()
    assert Shard.parse("3/8") == Shard(3, 8)
