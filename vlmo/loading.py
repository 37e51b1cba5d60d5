"""A trained model with what it needs to be used: its vocabulary and the names of its answers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from vlmo.data.tokenizer import load_vocabulary
from vlmo.model import VLMo

# Files of a run folder.
WEIGHTS, RECIPE = "model.safetensors", "recipe.json"
VOCABULARY, ANSWERS = "vocab.txt", "answers.json"


class Loaded(NamedTuple):
    """A model to use.

    Attributes:
        model: on the CPU, in evaluation mode.
        vocabulary: of its texts, for :class:`vlmo.data.TextTokenizer`; None if there is none.
        answers: of visual questions in the order of their ids; None if there are none.
    """

    model: VLMo
    vocabulary: Tokenizer | None
    answers: list[str] | None


def load_model(
    source: str | os.PathLike[str],
    *,
    vocabulary: str | os.PathLike[str] | None = None,
    answers: str | os.PathLike[str] | Sequence[str] | None = None,
    **changes: Any,
) -> Loaded:
    """Load a checkpoint, or what a training has left in its folder.

    Args:
        source: a checkpoint of any layout that :func:`vlmo.load_checkpoint` reads; or a run folder,
            which has a vocab.txt and, after VQA training, an answers.json beside its weights, or a
            checkpoint in one, such as best.safetensors.
        vocabulary: vocab.txt of the model, where the folder has none or another is wanted.
        answers: the answers in the order of their ids, or a JSON file with a list of them.
        changes: fields to change in the configuration found, e.g. ``image_size=480``.

    Raises:
        FileNotFoundError: ``source`` or a file it needs does not exist.
        CheckpointError: the checkpoint is damaged or of another kind.
        ValueError: vocabulary or answers are not those of the model, or no valid configuration.
    """
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        path /= WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: has no {WEIGHTS}, so it is no run folder")
    if Path(source).is_dir() or (folder / RECIPE).is_file():
        if vocabulary is None and (folder / VOCABULARY).is_file():
            vocabulary = folder / VOCABULARY
        if answers is None and (folder / ANSWERS).is_file():
            answers = folder / ANSWERS
    model = VLMo.from_checkpoint(path, **changes).eval()
    tokenizer = None if vocabulary is None else _vocabulary(vocabulary, model.config.vocab_size)
    named = None
    if answers is not None and "vqa" in model.config.tasks:
        named = _answers(answers, model.config.vqa_labels)
    return Loaded(model, tokenizer, named)


def _vocabulary(path: str | os.PathLike[str], size: int) -> Tokenizer:
    tokenizer = load_vocabulary(path)
    found = tokenizer.get_vocab_size()
    if found != size:
        raise ValueError(f"vocabulary: {os.fspath(path)} has {found} tokens, the model has {size}")
    return tokenizer


def _answers(given: str | os.PathLike[str] | Sequence[str], count: int) -> list[str]:
    if isinstance(given, (str, os.PathLike)):
        place, names = f"answers: {os.fspath(given)}", read_answers(given)
    else:
        place, names = "answers", list(given)
        _check_texts(place, names)
    if len(names) != count:
        raise ValueError(f"{place}: has {len(names)} answers, the model has {count}")
    return names


def read_answers(path: str | os.PathLike[str]) -> list[str]:
    """The answers of a JSON file, in the order of their ids.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or holds anything but a list of texts.
    """
    place = f"answers: {os.fspath(path)}"
    try:
        names = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of the syntax or of the encoding
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(names, list):
        raise ValueError(f"{place} holds no list")
    _check_texts(place, names)
    return names


def _check_texts(place: str, names: Iterable[Any]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{place}: {name!r} is not a text")
