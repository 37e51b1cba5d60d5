"""Data: sources and their samples, global batches, text tokenisation and masking."""

from vlmo.data.check import check_samples
from vlmo.data.digits.language import ANSWERS, Meaning, Question
from vlmo.data.digits.scenes import DigitScenes, Scene, retrieval_gallery
from vlmo.data.digits.tokenizer import digit_tokenizer
from vlmo.data.draws import Draw
from vlmo.data.loading import (
    HOST_KEYS,
    Batches,
    collate,
    guarded_loader,
    loader,
    to_device,
    worker_failure,
)
from vlmo.data.masking import mask_whole_words
from vlmo.data.samples import BadSample
from vlmo.data.sampling import GlobalBatches
from vlmo.data.sources import has_splits, open_data, texts_of
from vlmo.data.tokenizer import TextTokenizer, load_vocabulary, train_wordpiece

__all__ = [
    "ANSWERS",
    "HOST_KEYS",
    "BadSample",
    "Batches",
    "DigitScenes",
    "Draw",
    "GlobalBatches",
    "Meaning",
    "Question",
    "Scene",
    "TextTokenizer",
    "check_samples",
    "collate",
    "digit_tokenizer",
    "guarded_loader",
    "has_splits",
    "load_vocabulary",
    "loader",
    "mask_whole_words",
    "open_data",
    "retrieval_gallery",
    "texts_of",
    "to_device",
    "train_wordpiece",
    "worker_failure",
]
