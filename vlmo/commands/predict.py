"""``vlmo predict``: what a trained model says about images and texts."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vlmo.files import replacing
from vlmo.predictor import Predictor

TEXTS = ("text", "question", "statement", "caption")  # names of a record's text
_CHUNK = 1024  # records at a time


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        model: checkpoint or run folder.
        images: of one record: one image, or the two of NLVR2.
        texts: one record each, with the same images.
        input: .jsonl file of records instead, in which paths are relative to the file's folder.
        output: .jsonl file for the predictions; None for standard output.
        embeddings: .npz file for the unit vectors of the dual encoder; None for none.
        top: answers to each question.
        vocabulary: as of :meth:`vlmo.Predictor.load`, and so are the others.
    """

    model: Path
    images: tuple[Path, ...] = ()
    texts: tuple[str, ...] = ()
    input: Path | None = None
    output: Path | None = None
    embeddings: Path | None = None
    top: int = 1
    vocabulary: Path | None = None
    answers: Path | None = None
    batch_size: int = 64
    device: str = "auto"
    dtype: str = "auto"
    backend: str | None = None


@dataclass(frozen=True)
class Record:
    """Images and a text to look at.

    Attributes:
        given: the record as it was given, which its prediction repeats.
        place: where it was given, for errors.
        images: none, one, or the two of NLVR2.
        text: None if there is none.
    """

    given: dict[str, Any]
    place: str
    images: tuple[Path, ...]
    text: str | None


def run(settings: Settings) -> None:
    """Write embeddings, if they are asked for, and predictions, unless only embeddings are.

    A prediction is one JSON object, which repeats the record and adds what the model has a head
    for: ``similarity`` (cosine), ``match`` (probability), ``answers`` (with probabilities), and of
    two images ``true`` (probability). Embeddings are arrays ``image`` and ``text``, of which row n
    belongs to record n; their records may be images or texts alone.

    Raises:
        ValueError: records that say too little, or as :class:`vlmo.Predictor`.
        OSError: a file cannot be read or written.
    """
    if (settings.input is None) == (not settings.images and not settings.texts):
        raise ValueError("input: give either --input, or --image and --text")
    if len(settings.images) > 2:
        raise ValueError(f"image: {len(settings.images)} images are more than two")
    if settings.embeddings is not None and settings.embeddings.suffix != ".npz":
        raise ValueError(f"embeddings: {settings.embeddings} does not end in .npz")
    predictor = Predictor.load(
        settings.model,
        vocabulary=settings.vocabulary,
        answers=settings.answers,
        device=settings.device,
        dtype=settings.dtype,
        backend=settings.backend,
        batch_size=settings.batch_size,
    )
    if settings.embeddings is not None:
        with replacing(settings.embeddings) as temporary:
            arrays: dict[str, Any] = _embed(predictor, settings)
            np.savez(temporary, **arrays)
    if settings.embeddings is None or settings.output is not None:
        with _opened(settings.output) as stream:
            for records in _chunks(settings):
                for record, said in zip(
                    records, _predict(predictor, records, settings.top), strict=True
                ):
                    stream.write(json.dumps(record.given | said, ensure_ascii=False) + "\n")


def _predict(predictor: Predictor, records: list[Record], top: int) -> list[dict[str, Any]]:
    """What the heads of the model say about each record."""
    _check_heads(predictor, records)
    said: list[dict[str, Any]] = [{} for _ in records]
    for count, say in ((1, _say_of_one), (2, _say_of_two)):
        rows = [n for n, record in enumerate(records) if len(record.images) == count]
        columns = say(predictor, [records[n] for n in rows], top) if rows else {}
        for name, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                said[row][name] = value
    return said


def _say_of_one(predictor: Predictor, records: list[Record], top: int) -> dict[str, list[Any]]:
    """What is said of one image and a text, one value for each record."""
    images, texts = [record.images[0] for record in records], _texts(records)
    columns: dict[str, list[Any]] = {}
    if predictor.has("itc", "irtr"):
        cosines = predictor.embed_images(images) * predictor.embed_texts(texts)
        columns["similarity"] = cosines.sum(1).tolist()
    if predictor.has("itm"):
        columns["match"] = predictor.match(images, texts).tolist()
    if predictor.has("vqa"):
        answers = predictor.answer_all(images, texts, top)
        columns["answers"] = [[answer._asdict() for answer in row] for row in answers]
    return columns


def _say_of_two(predictor: Predictor, records: list[Record], top: int) -> dict[str, list[Any]]:
    first, second = ([record.images[n] for record in records] for n in range(2))
    return {"true": predictor.judge(first, second, _texts(records)).tolist()}


def _texts(records: list[Record]) -> list[str]:
    return [record.text for record in records if record.text is not None]


def _check_heads(predictor: Predictor, records: list[Record]) -> None:
    wanted = {}
    if predictor.has("itc", "irtr", "itm", "vqa"):
        wanted[1] = "an image and a text"
    if predictor.has("nlvr2"):
        wanted[2] = "two images and a text"
    heads = ", ".join(predictor.model.config.tasks)
    for record in records:
        if record.text is None or len(record.images) not in wanted:
            needed = " or ".join(wanted.values()) or "other things"
            raise ValueError(f"{record.place}: the model's heads ({heads}) need {needed}")


def _embed(predictor: Predictor, settings: Settings) -> dict[str, Any]:
    found: dict[str, list[np.ndarray]] = {"image": [], "text": []}
    kind = None
    for records in _chunks(settings):
        for record in records:
            own = len(record.images), record.text is not None
            kind = kind or own
            if own != kind or kind == (0, False) or kind[0] == 2:
                raise ValueError(
                    f"{record.place}: embeddings need an image, a text or both in every record"
                )
        if records[0].images:
            found["image"].append(predictor.embed_images([r.images[0] for r in records]).numpy())
        if records[0].text is not None:
            found["text"].append(predictor.embed_texts(_texts(records)).numpy())
    return {name: np.concatenate(parts) for name, parts in found.items() if parts}


def _chunks(settings: Settings) -> Iterator[list[Record]]:
    records = _given(settings) if settings.input is None else _read(settings.input)
    while chunk := list(itertools.islice(records, _CHUNK)):
        yield chunk


def _given(settings: Settings) -> Iterator[Record]:
    names = ("image",) if len(settings.images) == 1 else ("image_0", "image_1")
    shown = dict(zip(names, map(os.fspath, settings.images), strict=False))
    for text in settings.texts or (None,):
        said = {} if text is None else {"text": text}
        yield Record(shown | said, "predict", settings.images, text)


def _read(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _record(line, f"{path}, line {number}", path.parent)


def _record(line: str, place: str, folder: Path) -> Record:
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{place}: {line.strip()[:40]!r} is not a JSON object")
    names = [name for name in ("image", "image_0", "image_1") if name in given]
    if names not in ([], ["image"], ["image_0", "image_1"]):
        raise ValueError(f"{place}: has {' and '.join(names)}, not image, or image_0 and image_1")
    texts = [name for name in TEXTS if name in given]
    if len(texts) > 1:
        raise ValueError(f"{place}: has {' and '.join(texts)}, one text is wanted")
    for name in (*names, *texts):
        if not isinstance(given[name], str):
            raise ValueError(f"{place}: {name}: {given[name]!r} is not a text")
    images = tuple(folder / given[name] for name in names)
    return Record(given, place, images, given[texts[0]] if texts else None)


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        yield stream
