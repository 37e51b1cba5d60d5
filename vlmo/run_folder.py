"""Loads a trained model together with its vocabulary and the names of its answers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from vlmo.checkpoint.formats import (
    ANSWERS_RECORD,
    VOCABULARY_RECORD,
    CheckpointError,
    contents_of,
    read_records,
    summary,
)
from vlmo.checkpoint.io import load_checkpoint, model_config_of
from vlmo.data.tokenizer import SENTENCEPIECE_FILE, WORDPIECE_FILE, load_vocabulary
from vlmo.files import read_text
from vlmo.model.models import Config, Model, build, fits_vocabulary
from vlmo.tasks.losses import unused_parameters

# Files of a run folder.
WEIGHTS, RECIPE = "model.safetensors", "recipe.json"
VOCABULARIES, ANSWERS = (WORDPIECE_FILE, SENTENCEPIECE_FILE), "answers.json"


class Digests(NamedTuple):
    """What the weights of a checkpoint were trained with, as digests of :func:`digest`.

    Attributes:
        vocabulary: digest of the tokens in the order of their ids; None if unknown.
        answers: digest of the answers in the order of their ids; None if unknown or absent.
    """

    vocabulary: str | None
    answers: str | None


class Loaded(NamedTuple):
    """A model that is ready for inference.

    Attributes:
        model: on the CPU, in evaluation mode.
        vocabulary: for :class:`vlmo.data.TextTokenizer`; None if there is none.
        answers: answers to visual questions in the order of their ids; None if there are none.
        digests: digests of the vocabulary and the answers that the model was trained with.
    """

    model: Model
    vocabulary: Tokenizer | None
    answers: list[str] | None
    digests: Digests


def load_model(
    source: str | os.PathLike[str],
    *,
    vocabulary: str | os.PathLike[str] | None = None,
    answers: str | os.PathLike[str] | Sequence[str] | None = None,
    **changes: Any,
) -> Loaded:
    """Load a checkpoint or the result of a training in its run folder.

    Args:
        source: a checkpoint of any layout that :func:`vlmo.load_checkpoint` reads; or a run folder,
            which has a vocabulary and, after VQA training, an answers.json beside its weights; or a
            checkpoint in such a folder, such as best.safetensors.
        vocabulary: file for :func:`vlmo.data.load_vocabulary`, if the folder has none or another
            one is wanted.
        answers: the answers in the order of their ids, or a JSON file with a list of them.
        changes: fields to change in the configuration of the checkpoint, e.g. ``image_size=480``.

    Raises:
        FileNotFoundError: ``source`` or a file it needs does not exist.
        CheckpointError: the checkpoint is damaged or of another kind, lacks tensors that the
            model's tasks use, or has weights that are NaN or infinite.
        ValueError: vocabulary or answers are not those that the model was trained with, or the
            configuration is invalid.
    """
    path = weights_of(source)
    folder = path.parent
    if Path(source).is_dir() or (folder / RECIPE).is_file():
        vocabulary = vocabulary or vocabulary_in(folder)
        if answers is None and (folder / ANSWERS).is_file():
            answers = folder / ANSWERS
    config = model_config_of(path, **changes)
    digests = digests_of(path)
    tokenizer = named = None
    if vocabulary is not None:
        tokenizer = load_vocabulary(vocabulary)
        words = tokenizer.get_vocab()
        fits = fits_vocabulary(config, len(words))
        check_words(
            f"vocabulary: {os.fspath(vocabulary)}",
            sorted(words, key=words.__getitem__),
            "tokens",
            (len(words) if fits else config.vocab_size, digests.vocabulary),
            path,
        )
    if answers is not None and "vqa" in config.tasks:
        place, named = _answers(answers)
        check_words(place, named, "answers", (config.vqa_labels, digests.answers), path)
    return Loaded(_model(path, config), tokenizer, named, digests)


def weights_of(source: str | os.PathLike[str]) -> Path:
    """The checkpoint of a run folder, or ``source`` itself if it is not a folder.

    Raises:
        FileNotFoundError: the folder has no model.safetensors.
    """
    path = Path(source)
    if not path.is_dir():
        return path
    if not (path / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{path}: has no {WEIGHTS}, so it is no run folder{contents_of(path)}"
        )
    return path / WEIGHTS


def vocabulary_in(folder: str | os.PathLike[str]) -> Path | None:
    """The vocabulary of a run folder, a vocab.txt or a tokenizer.json; None if it has none."""
    found = (Path(folder) / name for name in VOCABULARIES)
    return next((path for path in found if path.is_file()), None)


def digest(words: Sequence[str]) -> str:
    """16 hex digits that depend on every word and on their order."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def digests_of(source: str | os.PathLike[str]) -> Digests:
    """Digests of the vocabulary and the answers that a model was trained with; reads no tensor.

    They are in the metadata of a checkpoint that training has written; for an older one, in the
    recipe.json beside it.

    Args:
        source: a checkpoint, or a run folder with or without weights.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the checkpoint is damaged or of another kind.
        ValueError: recipe.json is damaged.
    """
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    records: Mapping[str, str] = {}
    if path.is_file() or (path / WEIGHTS).is_file() or not path.exists():
        records = read_records(weights_of(path))
    run: Mapping[str, Any] = {}
    if not {VOCABULARY_RECORD, ANSWERS_RECORD} <= records.keys() and (folder / RECIPE).is_file():
        run = _recorded_run(folder / RECIPE)
    return Digests(
        records.get(VOCABULARY_RECORD) or _text(run.get("vocabulary")),
        records.get(ANSWERS_RECORD) or _text(run.get("answers")),
    )


def check_words(
    place: str,
    words: Sequence[str],
    kind: str,
    expected: tuple[int, str | None],
    weights: str | os.PathLike[str],
) -> None:
    """Raise ValueError unless ``words`` are those that a model was trained with, in their order.

    Args:
        place: origin of the words, for the error.
        words: tokens or answers in the order of their ids.
        kind: "tokens" or "answers".
        expected: their number, and their digest if known.
        weights: the checkpoint, for the error.
    """
    count, known = expected
    if len(words) != count:
        raise ValueError(
            f"{place} has {len(words)} {kind}, the model has {count} ({os.fspath(weights)})"
        )
    if known is not None and digest(words) != known:
        raise ValueError(
            f"{place} has other {kind}, or the same in another order, than those that "
            f"{os.fspath(weights)} was trained with"
        )


def _model(path: Path, config: Config) -> Model:
    """The model in evaluation mode; raises if a weight that it uses is missing or not finite."""
    model = build(config)
    report = load_checkpoint(model, path)
    missing = sorted(set(report.missing) - unused_parameters(config))
    if missing:
        raise CheckpointError(
            f"{path}: lacks {len(missing)} tensors that a model with the heads of "
            f"{', '.join(config.tasks)} needs: {summary(missing)}"
        )
    check_finite(model, os.fspath(path))
    return model.eval()


@torch.no_grad()
def check_finite(model: torch.nn.Module, name: str) -> None:
    """Raise CheckpointError, with the names of the tensors, if a weight is NaN or infinite."""
    state = model.state_dict()
    bad = [
        key for key, value in state.items() if value.is_floating_point() and not _is_finite(value)
    ]
    if bad:
        raise CheckpointError(
            f"{name}: {len(bad)} of {len(state)} tensors hold NaN or infinite weights: "
            f"{summary(bad)}"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _recorded_run(path: Path) -> Mapping[str, Any]:
    """The identity of the run recorded in recipe.json; empty if there is none."""
    content = read_json(path, os.fspath(path))
    run = content.get("run") if isinstance(content, dict) else None
    return run if isinstance(run, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _answers(given: str | os.PathLike[str] | Sequence[str]) -> tuple[str, list[str]]:
    """The name of the answers' source for errors, and the answers."""
    if isinstance(given, (str, os.PathLike)):
        return f"answers: {os.fspath(given)}", read_answers(given)
    names = list(given)
    _check_texts("answers", names)
    return "answers: the list", names


def read_answers(path: str | os.PathLike[str]) -> list[str]:
    """The answers of a JSON file, in the order of their ids.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or is not a list of texts.
    """
    place = f"answers: {os.fspath(path)}"
    names = read_json(path, place)
    if not isinstance(names, list):
        raise ValueError(f"{place} holds no list")
    _check_texts(place, names)
    return names


def read_json(path: str | os.PathLike[str], place: str) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON or not UTF-8; the message starts with ``place``.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # invalid syntax or encoding
        raise ValueError(f"{place} is not JSON: {error}") from error


def _check_texts(place: str, names: Iterable[Any]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{place}: {name!r} is not a text")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: {name!r} holds half of a surrogate pair") from error
