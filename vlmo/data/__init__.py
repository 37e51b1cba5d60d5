"""Data: digit scenes, text tokenisation and masking."""

from vlmo.data.digit_batches import DistinctBatches, collate, digit_tokenizer
from vlmo.data.digit_language import ANSWERS, Meaning, Question
from vlmo.data.digit_scenes import (
    DigitScenes,
    Scene,
    normalise,
    retrieval_gallery,
)
from vlmo.data.masking import mask_whole_words
from vlmo.data.tokenizer import TextTokenizer, load_vocabulary, train_wordpiece

__all__ = [
    "ANSWERS",
    "DigitScenes",
    "DistinctBatches",
    "Meaning",
    "Question",
    "Scene",
    "TextTokenizer",
    "collate",
    "digit_tokenizer",
    "load_vocabulary",
    "mask_whole_words",
    "normalise",
    "retrieval_gallery",
    "train_wordpiece",
]
