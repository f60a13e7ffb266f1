# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for the tiny targets: bytes, pairs of letters, two that begin and end
thinking, and one that ends an answer."""

from itertools import product
from pathlib import Path
from string import ascii_lowercase

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_targets import VOCAB_SIZE

THINK, THINK_END, END = "<think>", "</think>", "<|end|>"
THINK_ID, THINK_END_ID, END_ID = VOCAB_SIZE - 3, VOCAB_SIZE - 2, VOCAB_SIZE - 1


def save_tiny_tokenizer(folder: Path) -> None:
    """Put a tokenizer of `VOCAB_SIZE` tokens beside a tiny target's weights."""
    singles = sorted(pre_tokenizers.ByteLevel.alphabet())
    num_pairs = VOCAB_SIZE - len(singles) - 3
    merges = list(product(ascii_lowercase, repeat=2))[:num_pairs]
    words = [*singles, *("".join(pair) for pair in merges), THINK, THINK_END, END]
    model = models.BPE({word: i for i, word in enumerate(words)}, merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.add_tokens([THINK, THINK_END])  # not special: a reader of the text sees them
    assert fast.encode(THINK + THINK_END) == [THINK_ID, THINK_END_ID]
    fast.save_pretrained(folder)
