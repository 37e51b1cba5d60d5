"""The tokenizer of digit scenes."""

from __future__ import annotations

import functools
from pathlib import Path

from tokenizers import Tokenizer

from vlmo.data.tokenizer import TextTokenizer, load_vocabulary

# The vocabulary that train_wordpiece learns from all_texts() of digits/language.py, which
# tests/data/test_digit_scenes.py checks. It is stored as a file because runs record a digest of it.
_VOCABULARY = Path(__file__).with_name("vocab.txt")


@functools.cache
def _digit_wordpiece() -> Tokenizer:
    return load_vocabulary(_VOCABULARY)


def digit_tokenizer(max_length: int = 16) -> TextTokenizer:
    """Tokenizer for all texts about digit scenes.

    The longest text has 12 tokens, including [CLS] and [SEP].
    """
    return TextTokenizer(_digit_wordpiece(), max_length)
