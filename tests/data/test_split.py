# SPDX-License-Identifier: Apache-2.0
"""A prompt's hash, its side of the split and its seed."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_mtp.data.split import (
    Message,
    digest_of,
    is_held_out,
    prompt_id,
    prompt_seed,
)

identifiers = st.integers(0, 2**128 - 1).map(lambda number: f"{number:032x}")
fractions = st.floats(0, 1)


def turns(*pairs: tuple[str, str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_the_hashes_never_change() -> None:
    """Or else prompts held out of one data set are trained on in the next one."""
    identifier = prompt_id(turns(("user", "Hello, wörld")))
    assert identifier == "6bafea378f800a361ad6702f145d779f"
    assert prompt_seed(3, identifier) == 3730190036732599946
    assert is_held_out("0" * 32, 1e-9)
    assert is_held_out("7f" + "f" * 30, 0.5)
    assert not is_held_out("80" + "0" * 30, 0.5)


def test_prompts_that_read_alike_have_hashes_of_their_own() -> None:
    conversations = [
        turns(("user", "ab")),
        turns(("system", "ab")),
        turns(("user", "a"), ("user", "b")),
        turns(("user", "a"), ("user", ""), ("user", "b")),
        turns(("user", 'a"],["user","b')),
    ]
    assert len({prompt_id(found) for found in conversations}) == len(conversations)


@given(identifiers, fractions, fractions)
def test_a_larger_part_holds_out_the_same_and_more(
    identifier: str, one: float, other: float
) -> None:
    small, large = sorted([one, other])
    assert is_held_out(identifier, small) <= is_held_out(identifier, large)


@given(identifiers)
def test_all_and_nothing(identifier: str) -> None:
    assert is_held_out(identifier, 1.0)
    assert not is_held_out(identifier, 0.0)


def test_the_part_is_about_what_was_asked_for() -> None:
    found = [prompt_id(turns(("user", str(number)))) for number in range(4000)]
    held_out = sum(is_held_out(identifier, 0.1) for identifier in found)
    assert 320 < held_out < 480  # four standard deviations


@given(st.integers(-(2**40), 2**40), identifiers, identifiers)
def test_seeds_fit_and_follow_from_both(seed: int, one: str, other: str) -> None:
    assert 0 <= prompt_seed(seed, one) < 2**62
    assert prompt_seed(seed, one) != prompt_seed(seed + 1, one)
    assert (prompt_seed(seed, one) == prompt_seed(seed, other)) == (one == other)


def test_a_list_s_hash_knows_its_order() -> None:
    found = {digest_of(names) for names in (["a", "b"], ["b", "a"], ["a"], [])}
    assert len(found) == 4
