# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for the tiny targets: bytes, pairs of letters, and one that ends."""

from itertools import product
from pathlib import Path
from string import ascii_lowercase

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_targets import VOCAB_SIZE

END = "<|end|>"


def save_tiny_tokenizer(folder: Path) -> None:
    """Put a tokenizer of `VOCAB_SIZE` tokens beside a tiny target's weights."""
    singles = sorted(pre_tokenizers.ByteLevel.alphabet())
    num_pairs = VOCAB_SIZE - len(singles) - 1
    merges = list(product(ascii_lowercase, repeat=2))[:num_pairs]
    words = [*singles, *("".join(pair) for pair in merges), END]
    model = models.BPE({word: i for i, word in enumerate(words)}, merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(
        folder
    )
