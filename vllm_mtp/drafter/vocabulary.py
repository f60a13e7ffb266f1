# SPDX-License-Identifier: Apache-2.0
"""Choose the tokens of a reduced output vocabulary."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any


def most_frequent_tokens(
    tokenizer: Any, texts: Iterable[str], size: int, vocab_size: int
) -> tuple[int, ...]:
    """The tokens that a target uses most, see `frequent_tokens`.

    Args:
        tokenizer: The target's tokenizer (transformers).
        texts: Text of the kind that is served.
        size: How many tokens to choose.
        vocab_size: Size of the target's vocabulary.

    Returns:
        ``size`` ascending token ids.
    """
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens = tokens_of(tokenizer, vocab_size)
    return frequent_tokens(counts, tokenizer.all_special_ids, size, tokens)


def tokens_of(tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids that a tokenizer has, ascending.

    Many embeddings have more rows, for round sizes; these are never said. A tokenizer
    with tokens added to it has more ids than the embedding has rows.

    Args:
        tokenizer: The target's.
        vocab_size: Rows of the target's embedding.
    """
    ids = set(tokenizer.get_vocab().values())
    return tuple(sorted(i for i in ids if 0 <= i < vocab_size))


def frequent_tokens(
    counts: Counter[int], first: Iterable[int], size: int, tokens: Sequence[int]
) -> tuple[int, ...]:
    """The most frequent tokens of a count, behind those that must be there.

    Tokens that were never seen follow by id, since byte-pair vocabularies number common
    pieces first.

    Args:
        counts: How often each token was seen.
        first: Ids that are taken before all others; those that are no tokens are
            left out. Special tokens belong here: a drafter that cannot end a turn
            wastes the last draft of every answer.
        size: How many tokens to choose.
        tokens: All that there are, ascending; more than ``size``, or as many.

    Returns:
        ``size`` ascending token ids.
    """
    known = set(tokens)
    ranked = [token for token, _ in counts.most_common()]
    order = dict.fromkeys(i for i in (*first, *ranked, *tokens) if i in known)
    return tuple(sorted(list(order)[:size]))
