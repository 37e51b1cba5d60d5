"""The tokenizer of digit scenes."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer

from vlmo.data.digit_language import all_texts
from vlmo.data.tokenizer import TextTokenizer, train_wordpiece


@functools.cache
def _digit_wordpiece() -> Tokenizer:
    return train_wordpiece(all_texts(), vocab_size=256)


def digit_tokenizer(max_length: int = 16) -> TextTokenizer:
    """Tokenizer for all texts about digit scenes, with the same ids on every run.

    The longest text has 12 tokens, including [CLS] and [SEP].
    """
    return TextTokenizer(_digit_wordpiece(), max_length)
